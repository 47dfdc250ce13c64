"""OGD: updates have no part along the gradients of old logits."""

import functools

import pytest
import torch
from torch.optim import SGD, Adam
from toys import learn, make_learner, make_stream, mlp, weights

from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.projection.ogd import OGD
from cl_bench.subspace import extend_to_span

OPTIMIZERS = {
    "sgd": functools.partial(SGD, lr=0.05),
    "momentum and decay": functools.partial(SGD, lr=0.02, momentum=0.9, weight_decay=0.01),
    "adam": functools.partial(Adam, lr=0.005),
}


def double(scenario, tasks=2, n=12):
    stream = make_stream(scenario, tasks=tasks, n=n)
    for task in stream:
        task.data.tensors["x"] = task.data.tensors["x"].double()
    return stream


def make(stream, optimizer=None):
    model = mlp(bias=True, hidden=(8, 8))
    return make_learner(stream, model, optimizer, batch_size=6, head_bias=True).double()


def vector(strategy, learner, values):
    return torch.cat([values[name].flatten() for name in strategy.shared(learner)])


@pytest.mark.parametrize("scenario", ["domain", "task", "class"])
def test_the_basis_is_orthonormal_and_spans_the_gradients_of_the_logits(scenario):
    stream = double(scenario)
    strategy, learner = OGD(samples=8), make(stream)
    found = []
    for task in stream:
        learn(learner, strategy, task, epochs=1)
        sample = task.sample(8, learner.seed)
        for i in range(8):
            one = {k: v[i : i + 1] for k, v in sample.items()}
            gradients = learner.gradients(one, of="logits")
            blank = {n: torch.zeros_like(p) for n, p in strategy.shared(learner).items()}
            found.append(vector(strategy, learner, blank | gradients))
    B = strategy.basis
    torch.testing.assert_close(B.t() @ B, torch.eye(B.shape[1]).double(), atol=1e-9, rtol=0)
    G = torch.stack(found, 1)
    assert B.shape[1] <= 16
    assert (G - B @ (B.t() @ G)).norm() < 1e-5 * G.norm()
    first = B[:, :8]
    assert (G - first @ (first.t() @ G)).norm() > 0.1 * G.norm()  # the control
    heads = [n for n in strategy.shared(learner) if n.startswith("heads.")]
    assert (heads == []) == (scenario == "task")


class Watched(OGD):
    """Keeps the products of every step with the old gradients."""

    def __init__(self, rule=True, **options):
        super().__init__(**options)
        self.rule, self.products, self.lengths = rule, [], []

    def constrain(self, learner):
        self.was = weights(learner)
        if self.rule:
            super().constrain(learner)

    def after_step(self, learner, batch, out):
        if self.rule:
            super().after_step(learner, batch, out)
        if self.basis is not None:
            now = weights(learner)
            step = vector(self, learner, {n: now[n] - self.was[n] for n in now})
            self.products.append(float((self.basis.t() @ step).norm()))
            self.lengths.append(float(step.norm()))


@pytest.mark.parametrize(
    ("scenario", "kind"),
    [("domain", "sgd"), ("task", "momentum and decay"), ("class", "adam")],
)
def test_steps_are_orthogonal_to_old_gradients(scenario, kind):
    for rule in (True, False):
        stream = double(scenario)
        strategy, learner = Watched(rule, samples=8), make(stream, OPTIMIZERS[kind])
        for task in stream:
            learn(learner, strategy, task, epochs=1)
        share = max(p / x for p, x in zip(strategy.products, strategy.lengths, strict=True))
        assert min(strategy.lengths) > 1e-6
        assert share < 1e-9 if rule else share > 0.05


def test_old_logits_change_in_the_second_order_only():
    changes = {}
    for name, rule in (("ogd", OGD(samples=12)), ("finetune", Finetune())):
        for scale in (1e-3, 1e-4):
            stream = double("domain")
            learner = make(stream)
            learn(learner, rule, stream[0], epochs=2)
            sample = stream[0].sample(12, learner.seed)
            with torch.no_grad():
                before = learner.label_logits(learner(sample), sample)
            learner._optimizer_factory = functools.partial(SGD, lr=scale)
            learn(learner, rule, stream[1], epochs=1)
            with torch.no_grad():
                after = learner.label_logits(learner(sample), sample)
            changes[name, scale] = float((after - before).norm())
            rule.basis = None
    assert changes["ogd", 1e-4] < 0.03 * changes["ogd", 1e-3]  # lr^2
    assert 0.05 < changes["finetune", 1e-4] / changes["finetune", 1e-3] < 0.2  # lr


def test_what_is_held_does_not_move_and_the_rest_stays_orthogonal():
    stream = double("domain")
    strategy = Watched(samples=8)
    learner = make(stream, OPTIMIZERS["adam"])
    learn(learner, strategy, stream[0], epochs=1)
    setup = strategy.setup

    def holding(learner, task):
        setup(learner, task)
        learner.hold([learner.backbone.fc1])

    strategy.setup = holding
    before = weights(learner)
    learn(learner, strategy, stream[1], epochs=1)
    after = weights(learner)
    assert torch.equal(before["backbone.fc1.weight"], after["backbone.fc1.weight"])
    assert not torch.equal(before["backbone.fc2.weight"], after["backbone.fc2.weight"])
    assert max(strategy.products) < 1e-9


def test_vectors_that_add_nothing_add_no_direction():
    rng = torch.Generator().manual_seed(0)
    M = torch.linalg.qr(torch.randn(9, 2, generator=rng, dtype=torch.float64))[0]
    inside = M @ torch.randn(2, 3, generator=rng, dtype=torch.float64)
    assert torch.equal(extend_to_span(M, inside), M)
    one = torch.randn(9, 1, generator=rng, dtype=torch.float64)
    grown = extend_to_span(M, torch.cat([one, 2 * one, inside], 1))
    assert grown.shape == (9, 3)
    assert torch.equal(grown[:, :2], M)
