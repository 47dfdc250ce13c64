"""HAT: masks of units, and what they close."""

import functools

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from toys import DIM, make_learner, make_stream, mlp, weights

from cl_bench.contracts import UsageError
from cl_bench.experiment import TrainLoader, check_pair
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.isolation.hat import HAT
from cl_bench.subspace import Gates

OPTIMIZERS = {
    "sgd": functools.partial(SGD, lr=0.1),
    "momentum and decay": functools.partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.05),
    "adam": functools.partial(Adam, lr=0.01, weight_decay=0.05),
}


class Binary(HAT):
    """Its masks end as 0 or 1, half of each."""

    def consolidate(self, learner, task, stats):
        with torch.no_grad():
            for e in self.gates(learner, task.index).e:
                e.copy_(torch.where(e > e.median(), 6.0, -6.0))
        super().consolidate(learner, task, stats)


class Open(Binary):
    """The control: closes nothing."""

    def setup(self, learner, task):
        super().setup(learner, task)
        self.closed.taken = {}


def begin(kind="sgd", scenario="task", tasks=3, model=None, **stream):
    stream = make_stream(scenario, tasks=tasks, **stream)
    return stream, make_learner(stream, model or mlp(bias=True), OPTIMIZERS[kind], head_bias=True)


def learn(strategy, learner, task, epochs=2, watch=lambda: None):
    learner.begin(task, strategy)
    learner.train()
    optimizer = learner.configure_optimizers()
    for epoch in range(epochs):
        learner.stand(None, epoch, epochs, 4 * epochs)
        for batch in TrainLoader(task.train, 10, 0, task.index):
            watch()
            loss = learner.training_step(batch, 0)
            optimizer.zero_grad()
            loss.backward()
            strategy.constrain(learner)
            optimizer.step()
    strategy.consolidate(learner, task, strategy.collect(learner, task))
    strategy.release(learner)
    learner.equip(strategy)


def logits(strategy, learner, task):
    with torch.no_grad(), learner.evaluating(), strategy.inference(learner, task):
        return learner(task.everything, head=task.head)


@pytest.mark.parametrize(
    ("scenario", "kind"),
    [("domain", "sgd"), ("task", "momentum and decay"), ("domain", "adam")],
)
def test_what_binary_masks_own_stays_to_the_bit_and_so_do_old_logits(scenario, kind):
    for strategy in (Binary(), Open()):
        stream, learner = begin(kind, scenario)
        answers, kept = [], []
        for task in stream:
            learn(strategy, learner, task)
            answers.append(logits(strategy, learner, task))
            own = strategy.chain(learner, "auto").taken(strategy.owned)
            kept.append({p: (m == 1, p.detach().clone()) for p, m in own.items()})
        now = [logits(strategy, learner, task) for task in stream]
        same = all(map(torch.equal, now, answers))
        closed = all(
            torch.equal(p.detach()[m.expand_as(p)], before[m.expand_as(p)])
            for known in kept
            for p, (m, before) in known.items()
        )
        assert (same, closed) == ((True, True) if type(strategy) is Binary else (False, False))
        moved = (kept[0][learner.backbone.fc1.weight][1] - learner.backbone.fc1.weight).norm()
        assert moved > 1e-3, "the rest goes on to learn"
        with torch.no_grad(), learner.evaluating():
            bare = learner(stream[2].everything, head=stream[2].head)
        assert not torch.equal(bare, answers[-1]), "masks were attached at all"


def test_masks_of_ones_are_finetune(monkeypatch):
    found = []
    for ones in (True, False):
        if ones:
            monkeypatch.setattr(Gates, "mask", lambda self, i, s: torch.ones_like(self.e[i]))
        for strategy in (HAT(strength=0.0), Finetune()):
            stream, learner = begin(tasks=1)
            learn(strategy, learner, stream[0])
            kept = weights(learner)
            found.append({n: w for n, w in kept.items() if not n.startswith("extra")})
        monkeypatch.undo()
    assert all(torch.equal(w, found[1][n]) for n, w in found[0].items())
    assert any(not torch.equal(w, found[3][n]) for n, w in found[2].items())  # the control


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_soft_masks_close_in_part(kind):
    """A first step is the free one, times 1 - min(a_i, a_j), biases times 1 - a_i."""
    steps = {}
    for closed in (True, False):
        strategy = HAT()
        stream, learner = begin(kind, tasks=2)
        learn(strategy, learner, stream[0], epochs=1)
        rng = torch.Generator().manual_seed(4)
        strategy.owned = [torch.rand(24, generator=rng) for _ in range(2)]
        learner.begin(stream[1], strategy)
        if not closed:
            strategy.closed.taken = {}
        learner.train()
        learner.stand(None, 0, 1, 4)
        optimizer, before = learner.configure_optimizers(), weights(learner)
        optimizer.zero_grad()
        learner.training_step(stream[1].train[torch.arange(10)], 0).backward()
        strategy.constrain(learner)
        optimizer.step()
        steps[closed] = {n: w - before[n] for n, w in weights(learner).items()}
        one, two = strategy.owned
    wanted = {
        "backbone.fc1.weight": (1 - one)[:, None],
        "backbone.fc2.weight": 1 - torch.minimum(two[:, None], one[None]),
        "backbone.fc2.bias": 1 - two,
        "heads.1.weight": torch.ones(1),  # the task's own
    }
    for name, factor in wanted.items():
        torch.testing.assert_close(
            steps[True][name], factor * steps[False][name], atol=1e-7, rtol=1e-3
        )
        assert steps[False][name].norm() > 0


def test_the_steepness_grows_within_every_epoch():
    strategy, seen = HAT(smax=100.0), []
    stream, learner = begin(tasks=1)
    learn(strategy, learner, stream[0], 2, lambda: seen.append(strategy.sharpness(learner)))
    wanted = [0.01 + (100 - 0.01) * b / 4 for b in range(4)]
    assert seen == pytest.approx(wanted * 2)


def test_the_price_and_the_gradient_of_gates():
    gates = Gates([3, 2]).double()
    owned = [torch.tensor([1.0, 0.0, 0.5]).double(), torch.tensor([0.0, 1.0]).double()]
    s = 2.0
    a = [torch.sigmoid(s * e.detach()) for e in gates.e]
    price = (a[0][1] + 0.5 * a[0][2] + a[1][0]) / 2.5
    torch.testing.assert_close(gates.price(s, owned), price)
    torch.testing.assert_close(gates.price(s, []), torch.cat(a).mean())
    sum(gates.mask(i, s).sum() for i in range(2)).backward()
    gates.make_steady(s, 400.0)
    for e in gates.e:
        plain = torch.sigmoid(e.detach())
        torch.testing.assert_close(e.grad, 400 * plain * (1 - plain))
        e.data.mul_(100)
    gates.limit()
    assert max(float(e.detach().abs().max()) for e in gates.e) <= 6


class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x):
        return torch.relu(self.two(torch.relu(self.one(x)))) + x


def between(module, shape=(DIM,)):
    first = nn.Linear(DIM, 8) if len(shape) == 1 else nn.Conv2d(2, 8, 3)
    width = 8 if len(shape) == 1 else 8 * 4
    return nn.Sequential(first, module, nn.ReLU(), nn.Flatten(), nn.Linear(width, 6), nn.ReLU())


@pytest.mark.parametrize(
    ("model", "shape", "works"),
    [
        (between(nn.BatchNorm1d(8)), (DIM,), True),
        (between(nn.MaxPool2d(2), (2, 6, 6)), (2, 6, 6), True),
        (between(nn.LayerNorm(8)), (DIM,), False),
        (Skip(), (DIM,), False),
        (nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten()), (2, 6, 6), False),
    ],
)
def test_only_chains_are_learned(model, shape, works):
    stream, learner = begin(tasks=2, model=model, shape=shape)
    if not works:
        with pytest.raises(UsageError, match="HAT masks units of layers that follow one another"):
            learner.begin(stream[0], HAT())
        return
    strategy = Binary()
    learn(strategy, learner, stream[0])
    answer = logits(strategy, learner, stream[0])
    learn(strategy, learner, stream[1])
    assert torch.equal(logits(strategy, learner, stream[0]), answer)


def test_it_is_refused_where_it_cannot_work():
    with pytest.raises(UsageError, match="task id"):
        check_pair("hat", HAT(), make_stream("class"))
    with pytest.raises(UsageError, match="federation"):
        check_pair("hat", HAT(), make_stream("task"), True)
