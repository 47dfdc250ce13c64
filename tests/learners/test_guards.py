"""What a strategy guards of all that trains: said at the start, in the record, or refused."""

import functools
import json
import warnings

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from lightning import Trainer
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.optim import SGD, Adam
from toys import DIM, learn, make_learner, make_stream, mlp, weights

from cl_bench import run
from cl_bench.contracts import Protect, Strategy, UsageError
from cl_bench.experiment import Together
from cl_bench.integrations import ContinualCallback, Guarded
from cl_bench.integrations.borrowed import Borrowed
from cl_bench.learners.guards import grouped, guards
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.federated.fot import FOT
from cl_bench.strategies.penalty.ewc import EWC
from cl_bench.strategies.projection.adam_nscl import AdamNSCL
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.strategies.projection.rogo import ROGO
from cl_bench.strategies.projection.sgp import SGP
from cl_bench.strategies.replay.er import ER
from cl_bench.strategies.svd.adaptive_svd import AdaptiveSVD


class Attending(nn.Module):
    """Attention, a token and a normalisation between two linear layers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 6)

    def forward(self, x):
        h = self.embed(x.unflatten(1, (3, 4))) + self.token
        return self.out(self.norm(self.attention(h, h, h, need_weights=False)[0]))[:, 0]


def test_what_trains_and_is_not_guarded_is_named_with_its_size():
    learner = make_learner(make_stream(), Attending())
    found = guards(GPM(), learner)
    free = {
        "backbone.attention.in_proj_weight": 3 * 64,
        "backbone.attention.out_proj (NonDynamicallyQuantizableLinear)": 64 + 8,
        "backbone.attention.in_proj_bias": 24,
        "backbone.token": 8,
    }
    assert found.unprotected == free
    total = sum(p.numel() for p in learner.parameters())
    assert found.trained == total
    assert found.share == pytest.approx(1 - sum(free.values()) / total)
    assert not found.per_task
    told = " ".join(found.lines())
    assert all(name in told for name in free)


def test_what_really_moves_in_old_directions_is_what_is_named():
    stream = make_stream(tasks=2)
    learner, gpm = make_learner(stream, Attending()), GPM(1.0)
    names = guards(gpm, learner).names
    learn(learner, gpm, stream[0])
    before = weights(learner)
    memory = dict(gpm.memory)
    learn(learner, gpm, stream[1])
    for layer in learner.layers(gpm.protect):
        bias = None if layer.bias is None else before[f"{layer.name}.bias"]
        old = layer.matrix(before[f"{layer.name}.weight"], bias)
        change = (layer.matrix(layer.weight, layer.bias) - old).detach()
        assert float((change.double() @ memory[layer.name]).norm()) < 1e-5
    moved = {n for n, p in learner.named_parameters() if not torch.equal(p, before[n])}
    guarded = {f"{m.name}.{p}" for m in learner.layers(gpm.protect) for p in ("weight", "bias")}
    assert moved - guarded == names


@pytest.mark.parametrize(
    ("protect", "free"),
    [
        (Protect(), 0),
        (Protect(bias="free"), 24 + 24),
        (Protect(bias="frozen"), 0),
        (Protect(exclude=("*fc2",)), 24 * 24 + 24),
        (Protect(heads="never"), 24 * 3),
    ],
)
@pytest.mark.parametrize("kind", [GPM, AdamNSCL, FOT])
def test_the_policy_decides_what_is_guarded(kind, protect, free):
    learner = make_learner(make_stream(), mlp(bias=True))
    found = guards(kind(protect=protect), learner)
    assert sum(found.unprotected.values()) == free
    assert found.share == pytest.approx(1 - free / found.trained)


def test_heads_of_one_task_each_are_named_apart():
    found = guards(GPM(), make_learner(make_stream("task")))
    assert found.per_task == {"heads.* (Linear), 3 of them": 3 * 3 * 24}
    assert found.share == 1.0
    assert not found.unprotected
    together = guards(GPM(), make_learner(make_stream("class")))
    assert (together.share, together.per_task) == (1.0, {})
    alone = guards(GPM(protect=Protect(heads="never")), make_learner(make_stream("class")))
    assert alone.unprotected == {"heads.* (Linear), 3 of them": 3 * 3 * 24}


def test_adaptive_svd_guards_its_matrices_and_what_it_freezes():
    stream, body = make_stream(), 24 * DIM + 24 * 24
    for rest, guarded in (("all", body), ("none", body + 24 + 24 + 72)):
        found = guards(AdaptiveSVD(train_rest=rest), make_learner(stream, mlp(bias=True)))
        assert found.share == pytest.approx(guarded / found.trained)


@pytest.mark.parametrize("strategy", [Finetune(), ER(), EWC(), Together({"e": ER(), "w": EWC()})])
def test_who_makes_no_difference_says_nothing(strategy):
    assert guards(strategy, make_learner(make_stream())) is None


def test_a_companion_guards_nothing_more():
    learner = make_learner(make_stream(), Attending())
    both = guards(Together({"gpm": GPM(), "er": ER()}), learner)
    assert both == guards(GPM(), learner)


def test_layers_that_differ_in_their_number_are_one_group():
    network = nn.Sequential(*(nn.GRU(2, 2) for _ in range(4)), nn.Bilinear(2, 2, 2))
    found = grouped(network, dict(network.named_parameters()))
    gru = sum(p.numel() for p in network[0].parameters())
    assert found == {"* (GRU), 4 of them": 4 * gru, "* (Bilinear)": 10}


def own_run(tmp_path, strategy, model, *overrides):
    return run(
        make_stream(tasks=2),
        strategy,
        model,
        functools.partial(SGD, lr=0.05),
        overrides=[
            *("logger.mode=disabled", "trainer.accelerator=cpu", "trainer.max_epochs=1"),
            *("batch_size=20", "alignment.enabled=false", *overrides),
        ],
        run_dir=tmp_path / "run",
    )


def test_a_run_says_it_first_and_records_it(tmp_path, capsys):
    own_run(tmp_path, GPM(), Attending())
    lines = capsys.readouterr().out.splitlines()
    begin = "\n".join(lines[: next(i for i, x in enumerate(lines) if x.startswith("task 1"))])
    assert "guarded: " in begin
    assert "backbone.attention.in_proj_weight: 192" in begin.replace("\n", " ")
    events = [json.loads(x) for x in (tmp_path / "run/results.jsonl").read_text().splitlines()]
    kinds = [e["event"] for e in events]
    assert kinds.count("guards") == 1
    assert kinds.index("guards") < kinds.index("epoch")
    told = events[kinds.index("guards")]
    assert told["unprotected"]["backbone.token"] == 8
    assert 0 < told["share"] < 1


# -- weights with several uses ---------------------------------------------------------------------


class Twice(nn.Module):
    """x -> relu(W x) -> relu(W relu(W x)), by two layers with one weight."""

    def __init__(self, first=None, second=None):
        super().__init__()
        torch.manual_seed(3)
        self.a = first or nn.Linear(DIM, DIM, bias=False)
        self.b = second or nn.Linear(DIM, DIM, bias=False)
        self.b.weight = self.a.weight
        self.c = nn.Linear(DIM, 4, bias=False)

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


def task(t):
    rng = torch.Generator().manual_seed(t)
    x = torch.randn(60, 2 if t == 0 else DIM, generator=rng)
    x = x @ torch.randn(2, DIM, generator=rng) if t == 0 else x
    return x, torch.randint(0, 4, (60,), generator=rng)


@pytest.mark.parametrize("optimizer", [functools.partial(SGD, lr=0.1), Adam])
@pytest.mark.parametrize("kind", [GPM, SGP])
def test_one_weight_has_one_subspace_of_all_its_uses(kind, optimizer):
    net = Twice()
    optimizer = optimizer(net.parameters())
    strategy = kind(threshold=1.0)
    guard = Guarded(net, strategy)

    def learn_it(t):
        x, y = task(t)
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()

    x, y = task(0)
    with guard.task(optimizer, sample=(x, y)):
        learn_it(0)
    with torch.no_grad():
        inputs = torch.cat([x, torch.relu(net.a(x))])
        answers = net(x)
    W, M = net.a.weight.detach().clone(), strategy.memory["a"]
    assert torch.equal(M, strategy.memory["b"])
    assert float((inputs.double() - inputs.double() @ M @ M.t()).norm()) < 1e-4
    with guard.task(optimizer, sample=task(1)):
        learn_it(1)
    change = net.a.weight.detach() - W
    if kind is GPM:
        assert float((inputs @ change.t()).norm()) < 1e-4 * float(inputs.norm())
        torch.testing.assert_close(net(x), answers, atol=1e-3, rtol=1e-3)


def test_sgp_takes_a_shared_gradient_out_once():
    stream = make_stream(tasks=1)
    learner, strategy = make_learner(stream, Twice()), SGP(threshold=1.0, scale=0.5)
    learn(learner, strategy, stream[0])
    learner.begin(stream[0], strategy)
    raw = torch.randn(DIM, DIM)
    learner.backbone.a.weight.grad = raw.clone()
    strategy.constrain(learner)
    M, weights = strategy.memory["backbone.a"], strategy.importance["backbone.a"]
    expected = raw.double() - raw.double() @ M @ torch.diag(weights.double()) @ M.t()
    torch.testing.assert_close(learner.backbone.a.weight.grad.double(), expected, atol=1e-5, rtol=0)


def test_rogo_relaxes_a_shared_weight_once():
    stream = make_stream(tasks=2)
    learner, strategy = make_learner(stream, Twice()), ROGO(threshold=0.99, cosine=0.1)
    learn(learner, strategy, stream[0])
    learner.begin(stream[1], strategy)
    assert strategy.relax(learner, stream[1], 1) > 0
    assert "backbone.a" in strategy.relaxed.spaces
    assert "backbone.b" not in strategy.relaxed.spaces


class Transposed(nn.Module):
    """x -> W^T x."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(DIM, DIM))

    def forward(self, x):
        return F.linear(x, self.weight.t())


@pytest.mark.parametrize(
    ("net", "protect", "says"),
    [
        (lambda: Twice(second=Transposed()), Protect(), "different ways"),
        (lambda: Twice(second=nn.Linear(DIM, DIM)), Protect(), r"protect\.bias=frozen"),
        (lambda: Twice(), Protect(exclude=("*.b",)), "only one of them"),
        (lambda: nn.Sequential(weight_norm(nn.Linear(DIM, 4))), Protect(), "weight norm"),
    ],
)
def test_what_no_subspace_guards_is_refused_at_the_start(net, protect, says):
    learner = make_learner(make_stream(), net())
    with pytest.raises(UsageError, match=says):
        guards(GPM(protect=protect), learner)
    assert guards(Finetune(), learner) is None


def test_layers_of_one_weight_and_two_biases_need_those_frozen():
    learner = make_learner(make_stream(), Twice(second=nn.Linear(DIM, DIM)))
    assert guards(GPM(protect=Protect(bias="frozen")), learner).share == 1.0


# -- what cannot be guarded ------------------------------------------------------------------------


def adapted():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"]))


def test_adapters_are_guarded_in_the_place_of_the_layers_that_they_adapt():
    model = adapted()
    found = guards(GPM(), Borrowed(model, None, None, 0))
    assert found.share == 1.0
    factors = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(factors) == 2
    assert set(GPM().guarded(Borrowed(model, None, None, 0))) == factors


def test_adapters_that_are_no_linear_layers_are_refused():
    config = peft.LoraConfig(r=2, target_modules=["0"], use_dora=True)
    model = peft.get_peft_model(adapted().unload(), config)
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with (
        pytest.raises(UsageError, match=r"PEFT's adapters.*magnitude"),
        Guarded(model, GPM()).task(optimizer, sample=torch.randn(4, 8)),
    ):
        pytest.fail("entered")
    with Guarded(model, Finetune()).task(optimizer, sample=torch.randn(4, 8)):
        model(torch.randn(4, 8)).sum().backward()
        optimizer.step()


def test_frozen_layers_are_no_guard_of_what_trains():
    model = nn.Sequential(nn.Linear(8, 6).requires_grad_(False), nn.PReLU(6))
    with (
        pytest.raises(UsageError, match=r"would guard nothing.*1 \(PReLU\)|\* \(PReLU\)"),
        Guarded(model, GPM()).task(SGD(model[1].parameters(), 0.1), sample=torch.randn(4, 8)),
    ):
        pytest.fail("entered")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_are_refused(dtype):
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).to(dtype)
    with (
        pytest.raises(UsageError, match=r"half precision.*float32"),
        Guarded(model, GPM()).task(
            SGD(model.parameters(), 0.1), sample=torch.randn(4, 8, dtype=dtype)
        ),
    ):
        pytest.fail("entered")


@pytest.mark.parametrize("kind", [GPM, AdamNSCL, AdaptiveSVD])
def test_a_trainer_that_halves_the_weights_is_refused(tmp_path, kind):
    with pytest.raises(UsageError, match=r"precision=bf16-true.*precision=bf16-mixed"):
        own_run(
            tmp_path,
            kind(),
            mlp(),
            "trainer.precision=bf16-true",
            "trainer.masters=false",
            "pack=1",
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_who_guards_nothing_may_train_in_half_precision(tmp_path, precision):
    result = own_run(tmp_path, ER(), mlp(), f"trainer.precision={precision}", "pack=1")
    assert {p.dtype for p in result.learner.parameters()} <= {torch.bfloat16, torch.float16}
    # Scores are shares of the test samples, and not rounded to the weights' digits.
    right = result.matrix * len(make_stream(tasks=2)[0].test)
    assert right.min() > 0
    np.testing.assert_allclose(right, right.round(), atol=1e-9)


def test_the_callback_refuses_a_trainer_that_halves_the_weights():
    guard = ContinualCallback(GPM(), sample=torch.randn(4, 8), task=0)
    trainer = Trainer(precision="bf16-true", accelerator="cpu", logger=False)
    with pytest.raises(UsageError, match="bf16-mixed"):
        guard.setup(trainer, make_learner(make_stream()), "fit")


def test_a_strategy_of_ones_own_is_asked_and_not_known():
    class Half(Strategy):
        def guarded(self, learner):
            return frozenset(n for n, _ in learner.network.named_parameters() if "fc1" in n)

    found = guards(Half(), make_learner(make_stream()))
    assert found.share == pytest.approx(24 * DIM / (24 * DIM + 24 * 24 + 72))


def test_the_warning_comes_once():
    model = nn.Sequential(nn.Linear(8, 6), nn.PReLU(6), nn.Linear(6, 3))
    guard, optimizer = Guarded(model, GPM()), SGD(model.parameters(), lr=0.1)
    for t in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with guard.task(optimizer, sample=torch.randn(4, 8)):
                model(torch.randn(4, 8)).sum().backward()
                optimizer.step()
        told = [str(w.message) for w in caught if "unprotected" in str(w.message)]
        assert len(told) == (t == 0)
        assert t or "(PReLU): 6" in told[0]
        assert t or "% of the" in told[0]
