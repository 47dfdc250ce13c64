"""OWM: the projector, and what it leaves of old outputs."""

import functools

import pytest
import torch
from torch.optim import SGD, Adam
from toys import learn, make_engine, make_learner, make_stream, mlp, weights

from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.projection.owm import OWM
from cl_bench.subspace import Moments, Projection, grow, inverse_projection


def inputs(n=5, d=12):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def matrix(projection, d=12):
    return projection(torch.eye(d, dtype=torch.float64))


@pytest.mark.parametrize("alpha", [1e-3, 0.1, 10.0])
def test_the_projector_is_its_formula_symmetric_and_positive(alpha):
    x = inputs(n=30)
    A = x.t() @ x / 30
    P = matrix(inverse_projection(A, alpha))
    torch.testing.assert_close(P, torch.linalg.inv(A / alpha + torch.eye(12)), atol=1e-10, rtol=0)
    torch.testing.assert_close(P, P.t(), atol=1e-12, rtol=0)
    values = torch.linalg.eigvalsh(P)
    assert values.min() > 0
    assert values.max() <= 1 + 1e-12


def test_it_is_recursive_least_squares_whose_alpha_is_larger_by_the_number_of_vectors():
    """The authors' step: k = P r, P <- P - k k^T / (alpha + r^T k)."""
    x, alpha = inputs(n=7), 0.05
    P = torch.eye(12, dtype=torch.float64)
    for r in x:
        k = P @ r
        P = P - torch.outer(k, k) / (7 * alpha + r @ k)
    ours = matrix(inverse_projection(x.t() @ x / 7, alpha))
    torch.testing.assert_close(ours, P, atol=1e-12, rtol=0)
    other = matrix(inverse_projection(x.t() @ x, alpha))  # the control: another unit
    assert (other - P).norm() > 0.01


def test_without_alpha_it_is_gpms_projector():
    x = inputs()
    R = Moments(12)
    R.add(x)
    basis, _ = grow(None, R, 1.0, False)
    gpm = matrix(Projection(basis))
    gaps = [
        float((matrix(inverse_projection(R.gram / 5, alpha)) - gpm).norm())
        for alpha in (1e-2, 1e-4, 1e-8)
    ]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-6
    assert (matrix(inverse_projection(R.gram / 5, 1e-8)) @ x.t()).norm() < 1e-6


OPTIMIZERS = {
    "sgd": functools.partial(SGD, lr=0.05),
    "momentum and decay": functools.partial(SGD, lr=0.02, momentum=0.9, weight_decay=0.01),
    "adam": functools.partial(Adam, lr=0.005),
}


def shift(rule, optimizer, **options):
    """How far a second task moves the first one's logits, and the weights."""
    stream = make_stream(tasks=2, n=15)
    learner = make_learner(stream, mlp(bias=True), optimizer, head_bias=True, **options).double()
    for task in stream:
        task.data.tensors["x"] = task.data.tensors["x"].double()
    batch = stream[0].everything
    learn(learner, rule, stream[0], epochs=3)
    with torch.no_grad():
        before, start = learner(batch), weights(learner)
        learn_second(learner, rule, stream)
        moved = sum(float((w - start[n]).norm()) for n, w in weights(learner).items())
        return float((learner(batch) - before).norm()), moved


@torch.enable_grad()
def learn_second(learner, rule, stream):
    learn(learner, rule, stream[1], epochs=3)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_old_logits_stay_and_the_network_learns(kind):
    kept, moved = shift(OWM(alpha=1e-9), OPTIMIZERS[kind])
    lost, _ = shift(Finetune(), OPTIMIZERS[kind])
    assert kept < 1e-5 < 1e-2 < lost
    assert moved > 1e-2
    some, _ = shift(OWM(alpha=0.1), OPTIMIZERS[kind])
    assert kept < some < lost


def test_with_a_very_large_alpha_it_is_finetune():
    stream, found = make_stream(tasks=2), []
    for rule in (OWM(alpha=1e12), Finetune()):
        learner = make_learner(stream)
        for task in stream:
            learn(learner, rule, task, epochs=2)
        found.append(weights(learner))
    for name, w in found[0].items():
        torch.testing.assert_close(w, found[1][name], atol=1e-6, rtol=1e-5)


def test_what_is_remembered_is_the_mean_over_tasks():
    stream, strategy = make_stream(tasks=2), OWM()
    learner = make_learner(stream)
    engine = make_engine(learner, strategy, epochs=1)
    for t, task in enumerate(stream):
        engine.learn(task, strategy.plan(stream, t))
    x = [task.everything["x"].double() for task in stream]
    wanted = sum(v.t() @ v / len(v) for v in x) / 2
    torch.testing.assert_close(strategy.seen["backbone.fc1"], wanted, atol=1e-6, rtol=1e-5)
    values = strategy.metrics()["backbone.fc1"]
    P = matrix(inverse_projection(wanted, strategy.alpha))
    assert abs(values["capacity_left"] - float(P.trace()) / 12) < 1e-4
