"""GEM: no step against the gradient of any old task."""

import functools

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch.optim import SGD
from toys import learn, make_learner, make_stream

from cl_bench.strategies.replay.agem import AGEM
from cl_bench.strategies.replay.er import ER
from cl_bench.strategies.replay.gem import GEM, nearest


def problem(seed, k, p=12):
    rng = torch.Generator().manual_seed(seed)
    G = torch.randn(k, p, generator=rng, dtype=torch.float64)
    return torch.randn(p, generator=rng, dtype=torch.float64), G


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_the_programme_is_solved(k, margin):
    """Against a general solver, and by the conditions of its optimum."""
    for seed in range(6):
        g, G = problem(seed, k)
        z = nearest(g, G, margin)
        v = torch.linalg.lstsq(G.t(), (z - g).unsqueeze(1)).solution.flatten()
        products = G @ z
        assert (v >= margin - 1e-9).all()
        assert (products >= -1e-9).all()
        assert float((products * (v - margin)).abs().max()) < 1e-8
        found = minimize(
            lambda v, g=g, G=G: 0.5 * float((g + G.t() @ torch.from_numpy(v)).square().sum()),
            np.full(k, margin + 0.1),
            bounds=[(margin, None)] * k,
        )
        assert 0.5 * float(z.square().sum()) <= found.fun + 1e-6


def test_with_one_constraint_it_is_the_projection_of_agem():
    g, G = problem(1, 1)
    G = G if (G @ g) < 0 else -G
    wanted = g - (G[0] @ g) / (G[0] @ G[0]) * G[0]
    torch.testing.assert_close(nearest(g, G, 0.0), wanted, atol=1e-12, rtol=0)


def test_equal_and_opposite_constraints_leave_something_or_nothing():
    g, G = problem(0, 1)
    twice = torch.cat([G, G])
    torch.testing.assert_close(nearest(g, twice, 0.0), nearest(g, G, 0.0))
    both = nearest(g, torch.cat([G, -G]), 0.0)
    assert float((G @ both).abs().max()) < 1e-9


class Watched(GEM):
    """Keeps what a step's gradients were before and after."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seen = []

    def constrain(self, learner):
        named = learner.named_trainable()
        before = {n: p.grad.clone() for n, p in named.items() if p.grad is not None}
        old = [learner.gradients(batch, mode="train") for batch in self.kept.tasks()]
        super().constrain(learner)
        self.seen.append((before, old, {n: named[n].grad.clone() for n in before}))


def trained(strategy, scenario="domain", tasks=3, lr=0.2):
    stream = make_stream(scenario, tasks=tasks)
    learner = make_learner(stream, optimizer=functools.partial(SGD, lr=lr))
    for task in stream:
        learn(learner, strategy, task, epochs=3)
    return stream, learner


def flat(gradients, names):
    return torch.cat([gradients[n].flatten() for n in names]).double()


@pytest.mark.parametrize("scenario", ["domain", "task", "class"])
@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_no_product_is_negative_and_what_violates_nothing_stays(scenario, margin):
    strategy = Watched(memory=20, margin=margin)
    trained(strategy, scenario)
    kinds = set()
    for before, old, after in strategy.seen:
        names = list(before)
        g, now = flat(before, names), flat(after, names)
        products = [float(flat(o, names) @ g) for o in old]
        if not old or min(products) >= 0:
            kinds.add("free")
            assert torch.equal(g, now)  # to the bit
            continue
        kinds.add(len(old))
        for o in old:
            k = flat(o, names)
            assert float(now @ k) >= -1e-6 * max(1.0, float(now.norm() * k.norm()))
    assert {1, 2} <= kinds


def test_with_one_old_task_and_no_margin_it_is_agem_on_its_whole_memory():
    _, one = trained(GEM(memory=20, margin=0.0), tasks=2)
    _, other = trained(AGEM(memory=20, reference=20), tasks=2)
    for k, v in one.weights().items():
        torch.testing.assert_close(v, other.weights()[k], atol=1e-5, rtol=1e-4)


def test_the_memory_is_of_every_task():
    strategy = GEM(memory=15)
    stream, _ = trained(strategy)
    assert strategy.exemplars == 45
    for kept, task in zip(strategy.kept.tasks(), stream, strict=True):
        assert set(kept["y"].tolist()) <= set(task.classes)


@pytest.mark.parametrize("kind", [ER, GEM, AGEM])
def test_the_softmax_of_all_classes_pushes_those_to_come_down(kind):
    """Of batches, and of what is kept: the gradients of both have the heads to come."""
    for logits, moved in (("all", True), ("seen", False)):
        stream, learner = make_stream("class"), make_learner(make_stream("class"))
        strategy, before = kind(logits=logits), learner.heads[2].weight.clone()
        for task in stream[:2]:
            learn(learner, strategy, task, epochs=1)
        assert torch.equal(before, learner.heads[2].weight) is not moved
        learner.begin(stream[1], strategy)
        learner.train()
        kept = stream[0].everything
        assert (
            bool(learner.gradients(kept, mode="train").get("heads.2.weight") is not None) is moved
        )
        assert learner(kept).shape[1] == (9 if moved else 6)
