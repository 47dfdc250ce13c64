"""SLCA: distributions of classes, and heads that are aligned on features drawn from them."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.optim import SGD
from toys import make_engine, make_learner, make_stream

from cl_bench.contracts import UsageError, split_batch
from cl_bench.strategies.replay.slca import RIDGE, SLCA, Drawn, Normal


def learned(strategy, tasks=2, after=None):
    stream = make_stream("class", tasks=tasks)
    learner = make_learner(stream, optimizer=functools.partial(SGD, lr=0.05))
    engine = make_engine(learner, strategy, 1)
    for t in range(tasks):
        engine.learn(stream[t], strategy.plan(stream, t))
        if after is not None:
            after(learner, stream, t)
    return learner, stream


def test_a_class_is_remembered_as_it_was_when_it_was_learned():
    strategy, seen = SLCA(rate=0.05, epochs=1, each=8), []

    def after(learner, stream, t):
        batch = stream[t].everything
        pieces = split_batch(batch, learner.batch_size, learner.least_batch)  # for the same bits
        features = torch.cat([learner.eval().features(p) for p in pieces]).detach().double()
        for c in stream[t].classes:
            own = features[batch["y"] == c].numpy()
            wanted = np.cov(own, rowvar=False) + RIDGE * np.eye(own.shape[1])
            np.testing.assert_allclose(
                strategy.classes.covariances[c], wanted, rtol=1e-9, atol=1e-12
            )
            np.testing.assert_allclose(strategy.classes.means[c], own.mean(0), rtol=1e-9)
        seen.append(strategy.classes.means[:3].clone())

    learned(strategy, after=after)
    assert torch.equal(seen[0], seen[1]), "never measured again"
    assert strategy.classes.tasks == [(0, 3), (3, 6)]


def test_aligned_heads_answer_and_the_next_task_goes_on_from_those_before():
    strategy, seen = SLCA(rate=0.05, epochs=3, each=16), []

    def after(learner, stream, t):
        seen.append({n: p.detach().clone() for n, p in learner.heads.named_parameters()})

    learner, stream = learned(strategy, after=after)
    raw = {k.removeprefix("heads."): v for k, v in strategy.raw.items()}
    assert torch.equal(seen[0]["0.weight"], raw["0.weight"]), "an older head stays in training"
    assert not torch.equal(seen[1]["0.weight"], raw["0.weight"]), "and is aligned"
    assert not torch.equal(seen[1]["1.weight"], raw["1.weight"])
    body = {n: p.clone() for n, p in learner.backbone.named_parameters()}
    learner.begin(stream[1], strategy)
    for name, p in learner.heads.named_parameters():
        assert torch.equal(p, raw[name])
    assert all(torch.equal(p, body[n]) for n, p in learner.backbone.named_parameters())


def test_the_alignment_moves_heads_alone_and_computes_nothing_below_them():
    strategy, stream = SLCA(rate=0.05, epochs=2, each=8), make_stream("class", tasks=2)
    learner = make_learner(stream)
    engine = make_engine(learner, strategy, 1)
    engine.learn(stream[0], strategy.plan(stream, 0))
    before, begun = {}, []
    for phase in strategy.phases(learner, stream[1]):
        assert phase.of_features
        assert len(phase.data) == 6 * 8
    enter, calls = learner.enter, []

    def entering(phase, again=False):
        before.update({n: p.detach().clone() for n, p in learner.backbone.named_parameters()})
        begun.append(learner.backbone.register_forward_hook(lambda m, x, out: calls.append(1)))
        enter(phase, again)

    learner.enter = entering
    engine.learn(stream[1], strategy.plan(stream, 1))
    begun[0].remove()
    assert before
    assert all(torch.equal(p, before[n]) for n, p in learner.backbone.named_parameters())
    assert not calls


def test_features_are_drawn_from_the_classes_with_old_means_shrunk():
    classes = Normal()
    torch.manual_seed(0)
    roots = torch.randn(2, 3, 3, dtype=torch.float64)
    classes.means = torch.tensor([[4.0, -2.0, 1.0], [1.0, 0.0, 3.0]]).double()
    classes.covariances = roots @ roots.mT + RIDGE * torch.eye(3).double()
    classes.tasks = [(0, 1), (1, 2)]
    drawn = Drawn(classes, 2, 20_000, seed=1)
    found = drawn[torch.arange(40_000)]
    assert torch.equal(found["y"], torch.arange(2).repeat_interleave(20_000))
    for c, gamma in ((0, 0.95), (1, 1.0)):
        own = found["features"][found["y"] == c].double()
        spread = classes.covariances[c].diagonal().max().sqrt()
        torch.testing.assert_close(
            own.mean(0), gamma * classes.means[c], rtol=0, atol=float(5 * spread / 20_000**0.5)
        )
        torch.testing.assert_close(own.T.cov(), classes.covariances[c], rtol=0.1, atol=0.1)
    again, other = drawn.augmented(1), drawn.augmented(2)
    index = torch.arange(5)
    assert torch.equal(again[index]["features"], found["features"][:5])
    assert not torch.equal(other[index]["features"], found["features"][:5])


def test_logits_are_divided_by_the_mean_norm_of_tasks_logits():
    strategy = SLCA(tau=0.2)
    strategy.classes.tasks = [(0, 2), (2, 5)]
    torch.manual_seed(0)
    out, y = torch.randn(7, 5).double(), torch.arange(7) % 5
    norms = (out[:, :2].norm(dim=1) + out[:, 2:].norm(dim=1)) / 2
    wanted = F.cross_entropy(out / norms[:, None] / 0.2, y)
    loss = strategy.aligned(None, {"y": y}, out).mean
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    same = strategy.aligned(None, {"y": y}, 9 * out).mean
    torch.testing.assert_close(same, wanted, rtol=1e-6, atol=0)


def test_the_body_has_a_rate_of_its_own():
    strategy, stream = SLCA(rate=1e-3), make_stream("class", tasks=2)
    learner = make_learner(stream)
    learner.begin(stream[1], strategy)
    groups = learner.configure_optimizers().param_groups
    rates = {p: group["lr"] for group in groups for p in group["params"]}
    assert {rates[p] for p in learner.backbone.parameters()} == {1e-3}
    assert {rates[p] for p in learner.heads[1].parameters()} == {0.05}
    assert not any(p in rates for p in learner.heads[0].parameters())


def test_a_class_without_samples_is_refused():
    stats = {
        "counts": torch.tensor([3.0, 0.0, 2.0]),
        "sums": torch.zeros(3, 2),
        "squares": torch.zeros(3, 2, 2),
    }
    with pytest.raises(UsageError, match="class 1 of task 't0'"):
        Normal().add(make_stream("class")[0], stats)
