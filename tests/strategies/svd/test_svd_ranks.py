"""How much of a matrix adaptive SVD preserves: importance, ratios, schedules."""

import functools
import itertools
import math

import pytest
import torch
from cores import make
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import SGD
from toys import learn, make_learner, make_stream, mlp

from cl_bench.contracts import UsageError
from cl_bench.strategies.svd.adaptive_svd import AdaptiveSVD
from cl_bench.subspace import (
    CosineSum,
    effective_rank,
    preserved_rank,
    retention_ratios,
    snapped_rank,
)

# -- how much to preserve -------------------------------------------------------------------------


def test_importance_is_the_cosine_of_inputs_and_outputs():
    x = torch.randn(50, 6)
    for W, expected in ((torch.eye(6), 1.0), (-torch.eye(6), -1.0)):
        cosines = CosineSum(W)
        cosines.add(x)
        assert cosines.mean == pytest.approx(expected, abs=1e-6)
    # Rectangular: both are cut to their first coordinates.
    W = torch.randn(7, 6)
    wide, tall = CosineSum(torch.eye(4, 6)), CosineSum(torch.eye(6, 4))
    wide.add(x)
    tall.add(x[:, :4])
    assert wide.mean == pytest.approx(1.0, abs=1e-6)
    assert tall.mean == pytest.approx(1.0, abs=1e-6)
    parts = [CosineSum(W), CosineSum(W), CosineSum(W)]
    parts[0].add(x[:20])
    parts[1].add(x[20:])
    parts[2].add(x)
    assert (parts[0] + parts[1]).mean == pytest.approx(parts[2].mean, abs=1e-12)
    assert math.isnan(CosineSum(W).mean)


@given(st.lists(st.floats(0.01, 10.0), min_size=1, max_size=8), st.floats(0, 1), st.floats(0, 1))
def test_ratios_grow_with_importance_and_stay_shares(values, a, b):
    mrr, trr = sorted((a, b))
    importance = {str(i): v for i, v in enumerate(values)}
    ratios = retention_ratios(importance, mrr, trr)
    ordered = sorted(importance, key=importance.__getitem__)
    for lower, higher in itertools.pairwise(ordered):
        assert ratios[lower] <= ratios[higher] + 1e-12
    assert all(mrr - 1e-12 <= ratio <= 1.0 for ratio in ratios.values())
    mean = sum(values) / len(values)
    if max(values) * (trr - mrr) <= mean * (1 - mrr):  # nobody is cut, importances average 1
        assert sum(ratios.values()) / len(ratios) == pytest.approx(trr)


def test_ratios_are_clamped_and_a_mean_that_is_not_positive_is_an_error():
    ratios = retention_ratios({"a": -1.0, "b": 0.5, "c": 30.0}, 0.1, 0.8)
    assert (ratios["a"], ratios["c"]) == (pytest.approx(0.1), pytest.approx(1.0))
    for importance in ({"a": -1.0, "b": 1.0}, {"a": math.nan, "b": 1.0}):
        with pytest.raises(ValueError, match="mean"):
            retention_ratios(importance, 0.1, 0.8)


def test_ranks():
    assert [preserved_rank(x, 100) for x in (0.0, 0.29, 0.5, 0.999, 1.0)] == [0, 29, 50, 99, 100]
    assert preserved_rank(0.5, 7) == 3
    assert effective_rank(torch.ones(6)) == 6
    assert effective_rank(torch.tensor([5.0, 0.0, 0.0])) == 1
    assert effective_rank(torch.zeros(3)) == 0
    s = torch.tensor([10.0, 9.0, 8.0, 2.0, 1.9, 1.8, 1.7, 1.6, 1.5, 1.4])
    assert snapped_rank(5, s, 0.0) == 5
    assert snapped_rank(5, s, 0.1) == 6  # gaps at 4, 5 and 6: 0.050, 0.053, 0.056
    assert snapped_rank(5, s, 0.2) == 3
    assert [snapped_rank(k, s, 1.0) for k in (0, 10)] == [0, 10]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"schedule": "fixed", "preserve_ratio": 0.25}, [0, 6, 6]),
        ({"schedule": "budget", "tasks": 4}, [0, 6, 12]),
    ],
)
def test_schedules_give_the_ranks_they_say(options, expected):
    stream, learner = make()
    strategy = AdaptiveSVD(**options)
    found = []
    for task in stream:
        learn(learner, strategy, task, epochs=1)
        found.append(strategy.metrics().get("backbone.fc2", {}).get("rank", 0))
    assert found == expected


def test_the_schedule_by_effective_rank():
    stream, learner = make()
    strategy = AdaptiveSVD(schedule="effrank")
    learn(learner, strategy, stream[0])
    expected = effective_rank(torch.linalg.svdvals(learner.backbone.fc2.weight.detach().double()))
    learn(learner, strategy, stream[1], epochs=1)
    assert strategy.metrics()["backbone.fc2"]["rank"] == expected
    assert 0 < expected < 24


def identities():
    """Layers of known importance on non-negative inputs: 1, about 1, and -1."""
    model = mlp(hidden=(12, 12, 12))
    with torch.no_grad():
        for layer in (model.fc1, model.fc2, model.fc3):
            layer.weight.copy_(torch.eye(12))
        model.fc3.weight.neg_()
    return model


def test_importance_is_measured_with_the_previous_tasks_data_and_weights():
    stream = make_stream()
    learner = make_learner(stream, identities(), functools.partial(SGD, lr=0.0))
    strategy = AdaptiveSVD("importance", mrr=0.2, trr=0.6)
    learn(learner, strategy, stream[0])
    assert strategy.importance["backbone.fc1"] == pytest.approx(1.0, abs=1e-6)
    assert strategy.importance["backbone.fc3"] == pytest.approx(-1.0, abs=1e-6)
    learn(learner, strategy, stream[1], epochs=1)
    # The mean of 1, 1 and -1 is 1/3: normalised 3, cut at (1 - 0.2) / 0.4 = 2; and 0.
    ranks = {name: m["rank"] for name, m in strategy.metrics().items()}
    assert ranks == {"backbone.fc1": 12, "backbone.fc2": 12, "backbone.fc3": 2}
    assert strategy.metrics()["backbone.fc3"]["importance"] == pytest.approx(-1.0, abs=1e-6)


def test_importances_that_cannot_be_normalised_are_said():
    stream = make_stream()
    model = identities()
    with torch.no_grad():
        model.fc2.weight.neg_()
        model.fc1.weight.neg_()
    learner = make_learner(stream, model, functools.partial(SGD, lr=0.0))
    strategy = AdaptiveSVD("importance", start_task=0)
    with pytest.raises(UsageError, match=r"strategy.schedule=importance.*strategy.schedule=fixed"):
        learn(learner, strategy, stream[0])
