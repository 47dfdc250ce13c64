"""Metrics of answers against hand-computed values, and what mixed ones come to."""

import functools
import math

import numpy as np
import pytest

from cl_bench.contracts import UsageError
from cl_bench.metrics.answers import answer_metrics, metric_named
from cl_bench.metrics.answers.f1 import f1
from cl_bench.metrics.answers.json_validity import json_validity
from cl_bench.metrics.mixed import by_metric, is_mixed, summarise_alike


def test_f1_counts_words_both_have_without_articles_and_points():
    assert f1("", "the cat sat", "A cat sat.") == 1.0
    # wanted: cat sat on mat (4); found: cat cat ran (3); common: cat once.
    assert f1("", "the cat sat on the mat", "cat cat ran") == pytest.approx(2 * 1 / (4 + 3))
    assert f1("", "a", "") == f1("", "yes", "no") == 0.0


@pytest.mark.parametrize(
    ("text", "valid"),
    [('{"a": [1, null]}', 1), (" 3 ", 1), ('"x"', 1), ("{'a': 1}", 0), ('{"a": 1} ok', 0),
     ("", 0), ("NaN", 0), ("[" * 100_000, 0)],
)  # fmt: skip
def test_json_is_one_value_and_nothing_else(text, valid):
    assert json_validity("", "", text) == valid


def test_every_file_is_a_metric_by_name_and_a_function_of_ones_own_is_one():
    names = {"exact_match", "f1", "rouge_l", "choice_likelihood", "test_loss", "json_validity"}
    assert names <= set(answer_metrics())
    assert metric_named("choice_likelihood", "x")[1].sees == "choice"
    own = functools.partial(lambda text, right, given: float(len(given) > len(right)))
    own.func.__name__ = "longer"
    name, metric = metric_named(own, "x")
    assert name == "longer"
    assert metric.grade("", "a", "bb") == 1.0
    with pytest.raises(UsageError, match=r"x=rougel: there is no such metric\. Did you mean"):
        metric_named("rougel", "x")
    with pytest.raises(UsageError, match="x=3: name one of"):
        metric_named(3, "x")


R = np.array([[0.0, 0.0, 0.0], [0.8, 0.0, 0.0], [0.6, 0.5, 0.0], [0.4, 0.3, 0.9]])


def test_mixed_metrics_are_summed_up_apart():
    assert is_mixed(["f1", "f1", "test_loss"])
    assert not is_mixed(["f1"] * 3)
    assert all(math.isnan(v) for v in summarise_alike(R, ["f1", "f1", "test_loss"]).values())
    assert summarise_alike(R, ["f1"] * 3)["acc"] == pytest.approx(1.6 / 3)
    found = by_metric(R, ["f1", "test_loss", "f1"])
    assert found["f1"] == pytest.approx(
        {"tasks": 2, "end": (0.4 + 0.9) / 2, "learned": (0.8 + 0.9) / 2, "change": 0.4 - 0.8}
    )
    assert found["test_loss"]["change"] == pytest.approx(-0.2)
    half = np.array([*R[:2], [np.nan] * 3, [np.nan] * 3])
    assert list(by_metric(half, ["f1", "test_loss", "f1"])) == ["f1"]
    assert math.isnan(by_metric(half, ["f1"] * 3)["f1"]["change"])
