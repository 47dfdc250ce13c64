"""Options are what their annotations say, whoever gives them."""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cl_bench.contracts import Strategy, UsageError
from cl_bench.contracts.checking import annotations, check, checked, without_effect
from cl_bench.contracts.options import (
    Count,
    Inherited,
    OnlyWith,
    PartShare,
    Range,
    Share,
    SomeShare,
    Widths,
)


@checked("toy.")
@dataclass(frozen=True)
class Toy:
    flag: bool = False
    count: Count = 1
    share: Share = 0.5
    some: SomeShare | Sequence[SomeShare] | Mapping[str, SomeShare] = 0.5
    word: Literal["true", "false", "often"] = "true"
    mixed: bool | Literal["warn"] | None = None
    limit: Count | None = None
    pair: tuple[Count, PartShare] = (1, 0.0)
    widths: Widths = (3,)
    text: str = ""
    whatever: Any = None
    only: Annotated[Count, OnlyWith("flag"), OnlyWith("word", ("often",))] = 1


def refused(**options):
    with pytest.raises(UsageError) as caught:
        Toy(**options)
    return str(caught.value)


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.none())


@given(plain)
def test_a_boolean_is_a_boolean_and_nothing_else_is(value):
    if isinstance(value, bool):
        assert Toy(flag=value).flag is value
    else:
        assert refused(flag=value).startswith("toy.flag=")


@given(plain)
def test_a_count_is_a_whole_number_of_at_least_one(value):
    if type(value) is int and value >= 1:
        assert Toy(count=value).count == value
    else:
        assert refused(count=value).startswith("toy.count=")


@given(plain)
def test_a_share_is_a_finite_number_in_its_range(value):
    if type(value) in (int, float) and 0 <= value <= 1:
        assert Toy(share=value).share == value
    else:
        assert refused(share=value).startswith("toy.share=")


@given(st.lists(st.floats()) | st.dictionaries(st.text(), st.floats()))
def test_every_entry_counts(value):
    entries = list(value.values()) if isinstance(value, dict) else value
    if all(0 < entry <= 1 for entry in entries):
        assert Toy(some=value).some == value
    else:
        assert "every entry: must " in refused(some=value)


@given(st.integers(-5, 5), st.integers(-5, 5), st.integers(-6, 6))
def test_ends_of_a_range_are_open_or_closed_as_they_say(low, high, value):
    assert (value in Range(least=low, most=high)) == (low <= value <= high)
    assert (value in Range(above=low, below=high)) == (low < value < high)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flag": "no"}, "toy.flag=no: use true or false; by default false"),
        ({"flag": "false"}, "toy.flag='false': use true or false; by default false"),
        ({"flag": 0}, "toy.flag=0: use true or false; by default false"),
        ({"count": True}, "toy.count=true: must be a whole number; by default 1"),
        ({"count": 10.0}, "toy.count=10.0: must be a whole number; by default 1"),
        ({"count": "10"}, "toy.count='10': must be a whole number; by default 1"),
        ({"count": None}, "toy.count=null: must be a whole number; by default 1"),
        ({"count": 0}, "toy.count=0: at least 1"),
        ({"share": math.nan}, "toy.share=nan: must be a finite number; by default 0.5"),
        ({"share": -math.inf}, "toy.share=-inf: must be a finite number; by default 0.5"),
        ({"share": 1.5}, "toy.share=1.5: must lie in [0, 1]; by default 0.5"),
        ({"some": 0}, "toy.some=0: must lie in (0, 1]; by default 0.5"),
        ({"some": "x"}, "must be a number, a list of numbers or {name: a number}"),
        ({"some": [0.5, 2]}, "toy.some=[0.5, 2]: every entry: must lie in (0, 1]; by default 0.5"),
        ({"word": "seldom"}, "toy.word=seldom: use true, false or often; by default true"),
        ({"mixed": "no"}, "must be true or false, null or warn"),
        ({"limit": 0}, "toy.limit=0: at least 1, or null"),
        ({"pair": [1, 1.0]}, "every entry: must lie in [0, 1)"),
        ({"pair": [1]}, "must be a list of 2: a whole number, a number"),
        ({"widths": []}, "toy.widths=[]: name at least 1; by default [3]"),
        ({"widths": "ab"}, "must be a list of whole numbers"),
        ({"text": 5}, "toy.text=5: must be text"),
    ],
)
def test_one_line_names_the_value_and_the_remedy(options, message):
    said = refused(**options)
    assert message in said
    assert "\n" not in said


def test_what_is_right_is_taken_as_it_is():
    numbers = Toy(count=np.int64(3), share=np.float32(0.5), limit=None, pair=[2, 0.5])
    assert (numbers.count, numbers.limit, numbers.pair) == (3, None, [2, 0.5])
    thing = object()
    assert Toy(whatever=thing).whatever is thing
    assert Toy(mixed=False).mixed is False


def test_yaml_reads_true_as_a_boolean_where_an_option_is_called_that():
    assert Toy(word=True).word == "true"
    assert Toy(word=False).word == "false"
    assert Toy(mixed=True).mixed is True, "a boolean where one is meant"


def test_signatures_stay():
    def f(a: Count, *rest: Any, b: bool = True, **more: Any) -> tuple[Any, ...]:
        """Of f."""
        return a, rest, b, more

    made = checked("f.")(f)
    assert inspect.signature(made) == inspect.signature(f)
    assert made.__doc__ == "Of f."
    assert made(1, 2, b=False, c=3) == (1, (2,), False, {"c": 3})
    with pytest.raises(UsageError, match=r"f\.a=0: at least 1$"):
        made(0)
    with pytest.raises(TypeError):
        made()


def test_an_option_that_does_nothing_beside_another_is_found():
    def found(**values):
        return list(without_effect(Toy, values, ["only", "share"]))

    assert found() == [("only", "flag=... or word=often")]
    assert found(flag=True) == found(word="often") == []


def test_a_strategy_of_ones_own_is_checked_as_well():
    class Halves(Strategy):
        def __init__(self, share: float = 0.5, times: int = 1) -> None:
            self.share = share

    class Thirds(Halves):
        """Has no constructor of its own."""

    for kind in (Halves, Thirds):
        assert kind(1 / 3).share == 1 / 3
        with pytest.raises(UsageError, match=r"strategy\.share=nan: must be a finite number"):
            kind(math.nan)
        with pytest.raises(UsageError, match=r"strategy\.times=true: must be a whole number"):
            kind(times=True)


def test_options_of_a_base_count_as_ones_own():
    class Halves(Strategy):
        def __init__(self, share: Share = 0.5, times: Count = 1) -> None:
            self.share, self.times = share, times

    class Middle(Halves):
        """Has no constructor of its own."""

    class Quarters(Middle):
        def __init__(self, twice: bool = False, *, times: Count = 2, **shared: Inherited) -> None:
            super().__init__(times=times, **shared)
            self.twice = twice

    class Eighths(Quarters):
        def __init__(self, *, only: Annotated[bool, OnlyWith("share")] = False, **rest: Inherited):
            super().__init__(**rest)

    defaults = {n: p.default for n, p in inspect.signature(Eighths).parameters.items()}
    assert defaults == {"only": False, "twice": False, "times": 2, "share": 0.5}
    assert annotations(Eighths).keys() == defaults.keys()
    assert annotations(Eighths)["share"] == Share
    made = Eighths(share=0.25, twice=True)
    assert (made.share, made.times, made.twice) == (0.25, 2, True)
    assert (Quarters(True).twice, Halves(0.1, 3).times) == (True, 3)
    for options, said in (
        ({"share": 2}, r"share=2: must lie in \[0, 1\]; by default 0\.5"),
        ({"times": 0}, "times=0: at least 1"),
        ({"twice": 1}, "twice=1: must be true or false|twice=1: use true"),
    ):
        with pytest.raises(UsageError, match=rf"^strategy\.({said})"):
            Eighths(**options)
        with pytest.raises(UsageError, match=said):
            check(Eighths, options, "strategy.")
    with pytest.raises(TypeError, match="unexpected keyword argument 'shared'"):
        Eighths(shared=1)
    with pytest.raises(TypeError):
        Eighths(0.5)
    assert list(without_effect(Eighths, {"share": 0}, ["only"])) == [("only", "share=...")]


def test_annotations_that_only_type_checkers_can_read_are_left_alone():
    def f(a: "Nowhere", b: "int" = 1) -> None: ...  # noqa: F821

    assert check(f, {"a": 1, "b": 2}) == {"a": 1, "b": 2}
    with pytest.raises(UsageError, match="b=x: must be a whole number"):
        check(f, {"a": 1, "b": "x"})
