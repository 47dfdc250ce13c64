"""Forget quality and what is kept, by hand."""

import math

import pytest

from cl_bench.metrics import Evidence, forget_quality, retained_utility, summarise_further
from cl_bench.metrics.unlearning import utility_after

SCORES = [{"a": 0.8, "b": 0.6}, {"a": 0.8, "b": 0.4}, {"a": 0.4, "b": 0.3}]
FORGOTTEN = [{"f": 0.9, "g": 0.8}, {"f": 0.1, "g": 0.7}, {"f": 0.3, "g": 0.0}]


def test_they_are_their_formulas():
    assert utility_after(SCORES) == pytest.approx([0.7, 0.6, 0.35])
    assert retained_utility(SCORES) == pytest.approx(0.5)
    assert forget_quality(FORGOTTEN) == pytest.approx((1 - 0.3 / 0.9 + 1) / 2)
    assert math.isnan(forget_quality([{"f": 0.0}, {"f": 0.0}]))


def test_only_runs_with_requests_have_them():
    import numpy as np

    R = np.array([[0.1], [0.7]])
    found = summarise_further(Evidence(R, requests=list(zip(SCORES, FORGOTTEN, strict=True))))
    assert found["retained_utility"] == pytest.approx(0.5)
    assert found["forget_quality"] == pytest.approx(5 / 6)
    assert "forget_quality" not in summarise_further(Evidence(R))
