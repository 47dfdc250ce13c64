"""SGP: importance, surrogate singular values, and its limits, GPM and SGD."""

import copy

import pytest
import torch
from family import NETWORKS, feed, make, setting, sgd, threshold
from hypothesis import given
from hypothesis import strategies as st
from toys import learn, make_engine, make_learner, make_stream, weights

from cl_bench.contracts import Plan
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.strategies.projection.sgp import SGP, importance_of


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8), st.floats(0, 50))
def test_importance_lies_between_0_and_1(values, alpha):
    s = torch.tensor(values, dtype=torch.float64)
    found = importance_of(s, alpha)
    assert bool(((found >= 0) & (found <= 1 + 1e-12)).all())
    if max(values) > 0:
        assert float(found.max()) == pytest.approx(1)
    order = s.argsort()
    assert bool((found[order].diff() >= -1e-12).all())


@pytest.mark.parametrize("network", NETWORKS)
def test_importance_accumulates(network):
    stream, learner = setting(network)
    sgp = make("sgp", network)
    learn(learner, sgp, stream[0], epochs=3)
    first = dict(sgp.importance)
    for name, weight in first.items():
        assert not len(weight) or float(weight.max()) == pytest.approx(1)
        assert bool((weight > 0).all())
        assert len(weight) == sgp.memory[name].shape[1]
    learn(learner, sgp, stream[1], epochs=3)
    for name, weight in sgp.importance.items():
        k = len(first[name])
        assert bool((weight[:k] >= first[name]).all())
        assert bool(((weight > 0) & (weight <= 1)).all())
        assert len(weight) == sgp.memory[name].shape[1]
    row = sgp.metrics()["heads.0"]
    assert 0 < row["importance_min"] <= row["importance_mean"] <= 1


def test_surrogate_singular_values_are_row_norms():
    rng = torch.Generator().manual_seed(0)
    sgp = SGP(threshold=0.9, scale=3.0)
    old, new = (
        torch.randn(8, 30, generator=rng).double() * torch.logspace(0, -2, 8)[:, None].double()
        for _ in range(2)
    )
    feed(sgp, old)
    M, before = sgp.memory["l"], sgp.importance["l"]
    feed(sgp, new.flip(0))
    R = new.flip(0)
    projected = torch.linalg.svd(M @ M.t() @ R, full_matrices=False)
    surrogate = ((M.t() @ projected[0]).square() * projected[1].square()).sum(1).sqrt()
    torch.testing.assert_close(surrogate, (M.t() @ R).norm(dim=1))
    S = torch.linalg.svdvals(R - M @ M.t() @ R)[: len(sgp.importance["l"]) - len(before)]
    s = torch.cat([surrogate, S])
    v = 4 * s / (3 * s + s.max())
    expected = torch.cat([(before + v[: len(before)]).clamp(max=1), v[len(before) :]])
    torch.testing.assert_close(sgp.importance["l"], expected)


@pytest.mark.parametrize("network", NETWORKS)
def test_importance_1_is_gpm_and_0_is_sgd(network):
    stream, learner = setting(network)
    twins = {name: copy.deepcopy(learner) for name in ("gpm", "one", "zero", "sgd")}
    gpm, free = GPM(threshold(network), samples=40), Finetune()
    one, zero = make("sgp", network), make("sgp", network)
    for name, strategy in (("gpm", gpm), ("one", one), ("zero", zero), ("sgd", free)):
        learn(twins[name], strategy, stream[0], epochs=3)
        if name in ("one", "zero"):
            fill = torch.ones_like if name == "one" else torch.zeros_like
            strategy.importance = {n: fill(w) for n, w in strategy.importance.items()}
        learn(twins[name], strategy, stream[1], epochs=3)
    found = {name: weights(twin) for name, twin in twins.items()}
    for name, w in found["gpm"].items():
        torch.testing.assert_close(found["one"][name], w, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found["zero"][name], found["sgd"][name], atol=1e-5, rtol=1e-4)
    assert any(float((found["gpm"][n] - found["sgd"][n]).norm()) > 1e-2 for n in found["gpm"])


@pytest.mark.usefixtures("always_inputs")
@pytest.mark.parametrize("name", ["sgp", "trgp", "rogo"])
@pytest.mark.parametrize("pack", [1, 4])
def test_projecting_inputs_is_projecting_gradients(name, pack):
    learned = {}
    for project in ("input", "gradient"):
        stream = make_stream(tasks=3)
        learner = make_learner(stream, optimizer=sgd, pack=pack)
        strategy = make(name, threshold=0.8, project=project)
        engine = make_engine(learner, strategy, epochs=3, pack=pack)
        for task in stream:
            engine.learn(task, Plan(task.train))
        learned[project] = weights(learner)
    for layer, w in learned["input"].items():
        torch.testing.assert_close(w, learned["gradient"][layer], atol=1e-4, rtol=1e-3)
