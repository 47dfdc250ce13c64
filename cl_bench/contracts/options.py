"""What an option may be, as annotations say it; :mod:`cl_bench.contracts.checking` reads them.

An annotation says the kind: ``bool``, ``int``, ``float``, ``str``, ``Literal``, ``X | None``,
sequences, mappings, dataclasses. ``Annotated`` adds a range, ``Annotated[float, Range(least=0)]``,
or :class:`OnlyWith` the option without which this one does nothing. The rules:

* A boolean is ``true`` or ``false``; words and numbers that stand for one are refused, and so is a
  boolean where a number is meant. Where a ``Literal`` has the word ``"true"``, ``true`` is that.
* A whole number is written as one: 10, not 10.0. A number is finite. Text is no number.
* None stands where the annotation or the default has it.
* What cannot be told from an annotation (``Any``, a protocol, a module) is not checked.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True)
class Range:
    """Where a number must lie; each end may be open.

    Attributes:
        least, most: ends that may be reached.
        above, below: ends that may not.
    """

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        low, opening = (self.above, "(") if self.above >= self.least else (self.least, "[")
        high, closing = (self.below, ")") if self.below <= self.most else (self.most, "]")
        if high == math.inf:
            if low == 0 and opening == "[":
                return "must not be negative"
            return f"at least {low:.12g}" if opening == "[" else f"must be above {low:.12g}"
        return f"must lie in {opening}{low:.12g}, {high:.12g}{closing}"


@dataclass(frozen=True)
class Length:
    """How many entries a list must have."""

    least: int


@dataclass(frozen=True)
class OnlyWith:
    """The option has an effect only beside another one of the same object.

    Of several of these on one option, one must hold.

    Attributes:
        option: the other one.
        values: with which this one has an effect; none means all but null, false, 0 and empty.
    """

    option: str
    values: tuple[Any, ...] = ()

    def holds(self, value: Any) -> bool:
        """Whether the other option's value lets this one have an effect."""
        return any(shown(value) == shown(v) for v in self.values) if self.values else bool(value)

    def __str__(self) -> str:
        return f"{self.option}={' or '.join(map(shown, self.values)) or '...'}"


class Inheriting:
    """Marks ``**name`` in a class's ``__init__``."""


Inherited = Annotated[Any, Inheriting()]
"""Of ``**name`` in the ``__init__`` of a class that is checked: the options of its base class, to
which it hands them. They count as the class's own, each by its name."""

NotNegative, Positive = Range(least=0), Range(above=0)
Count = Annotated[int, Range(least=1)]
"""How many there are: at least 1."""
Index = Annotated[int, Range(least=0)]
"""Counted from 0; also how many there are, if there may be none."""
Strength = Annotated[float, NotNegative]
Rate = Annotated[float, Positive]
Share = Annotated[float, Range(least=0, most=1)]
"""In [0, 1]."""
SomeShare = Annotated[float, Range(above=0, most=1)]
"""In (0, 1]: some of it."""
PartShare = Annotated[float, Range(least=0, below=1)]
"""In [0, 1): not all of it."""
Widths = Annotated[Sequence[Count], Length(1)]
"""Of layers, at least one."""
Seed = Index
"""Any whole number that is not negative."""


def known(wrong: str, names: Sequence[str], prefix: str = "") -> str:
    """A hint at the name that was meant, if one is near."""
    close = difflib.get_close_matches(wrong, list(names), n=1)
    return f" Did you mean {prefix}{close[0]}?" if close else ""


def shown(value: Any) -> str:
    """A value as it is written in a configuration."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {shown(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    return repr(value) if isinstance(value, str) and _ambiguous(value) else f"{value}"


def _ambiguous(text: str) -> bool:
    """Whether the text would be read as something else without quotes."""
    try:
        float(text)
    except ValueError:
        return text.lower() in ("", "true", "false", "null")
    return True
