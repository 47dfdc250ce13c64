"""Strategies inside loops that are not ours: plain PyTorch and somebody's LightningModule."""

import copy
import functools
import io
import re
import types
import warnings
from pathlib import Path

import lightning
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim import LBFGS, SGD, Adam, AdamW
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.data import DataLoader, TensorDataset
from toys import make_engine

from cl_bench.contracts import Plan, Protect, Strategy, UsageError
from cl_bench.experiment import Together, TrainLoader
from cl_bench.integrations import ContinualCallback, Guarded
from cl_bench.learners import Classifier
from cl_bench.models import MLP
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.baselines.joint import Joint
from cl_bench.strategies.isolation.freeze import Freeze
from cl_bench.strategies.penalty.ewc import EWC
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.strategies.projection.sgp import SGP
from cl_bench.strategies.projection.trgp import TRGP
from cl_bench.strategies.replay.er import ER
from cl_bench.tasks.permuted_digits import PermutedDigits

DOCS = Path(__file__).parents[2] / "docs/integrations.md"
OPTIMIZERS = {
    "SGD": functools.partial(SGD, lr=0.1),
    "momentum": functools.partial(SGD, lr=0.02, momentum=0.9),
    "Adam": functools.partial(Adam, lr=2e-3),
    "AdamW": functools.partial(AdamW, lr=2e-3, weight_decay=0.1),
}
each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CL_BENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@functools.cache
def stream():
    return PermutedDigits(num_tasks=2)


@functools.cache
def data(t):
    batch = stream()[t].train[torch.arange(len(stream()[t].train))]
    return batch["x"], batch["y"]


def network(bias=True):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 40, bias=bias), nn.ReLU(), nn.Linear(40, 10, bias=bias)
    )


def normalised():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)
    )


def loop(model, optimizer, t, epochs=2, accumulate=1, clip=None, closure=False):
    """Somebody's training loop."""
    x, y = data(t)
    shuffle = torch.Generator().manual_seed(t)
    for _ in range(epochs):
        model.train()
        for i, rows in enumerate(torch.randperm(len(x), generator=shuffle).split(32), start=1):

            def loss(rows=rows):
                value = F.cross_entropy(model(x[rows]), y[rows])
                value.backward()
                return value

            if closure:

                def evaluate(loss=loss):
                    optimizer.zero_grad()
                    return loss()

                optimizer.step(evaluate)
                continue
            loss()
            if i % accumulate == 0:
                if clip:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()


def matrices(model):
    """[W | b] of every layer, as the strategy sees them."""
    return {
        name: torch.cat(
            [m.weight.detach().flatten(1), *([] if m.bias is None else [m.bias.detach()[:, None]])],
            dim=1,
        )
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d)
    }


def leaks(memory, before, after):
    """|dW M| / |dW| of every layer; it has moved, and it has something to stay away from."""
    found = {}
    for name, M in memory.items():
        change = (after[name] - before[name]).double()
        assert change.norm() > 1e-3
        assert 0 < M.shape[1] < M.shape[0]
        found[name] = float((change @ M).norm() / change.norm())
    return found


def accuracy(model, t):
    batch = stream()[t].test[torch.arange(len(stream()[t].test))]
    model.eval()
    with torch.no_grad():
        return float((model(batch["x"]).argmax(1) == batch["y"]).double().mean())


class Module(lightning.LightningModule):
    """Somebody's module."""

    def __init__(self, network, optimizer, manual=False):
        super().__init__()
        self.network = network
        self.make_optimizer = optimizer
        self.automatic_optimization = not manual

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


def trainer(*callbacks, epochs=2, **options):
    options = {"logger": False, "enable_checkpointing": False, **options}
    return Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def loader(t):
    shuffle = torch.Generator().manual_seed(t)
    return DataLoader(TensorDataset(*data(t)), batch_size=32, shuffle=True, generator=shuffle)


def guard_of(strategy, t, **options):
    return ContinualCallback(strategy, sample=data(t), task=t, **options)


# -- the printed code -----------------------------------------------------------------------------

SNIPPETS = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)


@pytest.mark.parametrize("position", range(len(SNIPPETS)))
def test_docs_run_as_printed(position):
    namespace = {"__name__": "docs"}
    exec(compile(SNIPPETS[position], f"{DOCS.name}[{position}]", "exec"), namespace)
    model = namespace.get("model") or namespace["module"].network
    strategy = namespace.get("strategy") or namespace["guard"].strategy
    assert len(SNIPPETS) == 2
    assert [M.shape[1] > 0 for M in strategy.memory.values()] == [True, True]
    assert accuracy(model, 0) > 0.8
    assert accuracy(model, 1) > 0.6


# -- the same update as ours ----------------------------------------------------------------------


def engine_weights(optimizer, epochs=2):
    torch.manual_seed(1)
    learner = Classifier(stream(), MLP((1, 8, 8), (40,)), optimizer, 32, seed=0)
    start = [p.detach().clone() for p in learner.parameters()]
    engine = make_engine(learner, GPM(threshold=0.97), epochs, batch_size=32)
    for task in stream():
        engine.learn(task, Plan(task.train))
    return start, [p.detach() for p in learner.parameters()]


def assert_same_path(start, ours, theirs):
    for before, expected, found in zip(start, ours, theirs, strict=True):
        moved = (expected - before).norm()
        assert moved > 0.1
        assert (found - expected).norm() < 1e-4 * moved


@each_optimizer
def test_plain_loop_makes_the_weights_of_our_engine(optimizer):
    start, ours = engine_weights(OPTIMIZERS[optimizer])
    model = network(bias=False)
    model[1].weight.data.copy_(start[0])
    model[3].weight.data.copy_(start[1])
    guard = Guarded(model, GPM(threshold=0.97))
    for t, task in enumerate(stream()):
        stepper = OPTIMIZERS[optimizer](model.parameters())
        with guard.task(stepper, sample=data(t)):
            batches = TrainLoader(task.train, 32, 0, t)
            for _ in range(2):
                for batch in batches:
                    stepper.zero_grad()
                    F.cross_entropy(model(batch["x"]), batch["y"]).backward()
                    stepper.step()
    assert_same_path(start, ours, list(model.parameters()))


class Pairs:
    """Our batches, as the pairs of somebody's loader."""

    def __init__(self, t):
        self.batches = TrainLoader(stream()[t].train, 32, 0, t)

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return ((batch["x"], batch["y"]) for batch in self.batches)


@pytest.mark.parametrize("manual", [False, True])
def test_callback_makes_the_weights_of_our_engine(manual):
    start, ours = engine_weights(OPTIMIZERS["Adam"])
    module = Module(network(bias=False), OPTIMIZERS["Adam"], manual)
    module.network[1].weight.data.copy_(start[0])
    module.network[3].weight.data.copy_(start[1])
    strategy = GPM(threshold=0.97)
    for t in range(2):
        trainer(guard_of(strategy, t)).fit(module, Pairs(t))
    assert_same_path(start, ours, list(module.parameters()))


# -- the invariant --------------------------------------------------------------------------------


def second_task(model, optimizer, strategy=None, **options):
    """Two tasks with one optimizer; the leaks of the second."""
    strategy = strategy or GPM(threshold=0.97)
    guard = Guarded(model, strategy)
    with guard.task(optimizer, sample=data(0)):
        loop(model, optimizer, 0, **options)
    memory, before = dict(strategy.memory), matrices(model)
    with guard.task(optimizer, sample=data(1)):
        loop(model, optimizer, 1, **options)
    return leaks(memory, before, matrices(model))


@each_optimizer
@pytest.mark.parametrize("make", [network, normalised])
def test_plain_loop_keeps_the_weight_change_out_of_old_inputs(optimizer, make):
    model = make()
    stepper = OPTIMIZERS[optimizer](model.parameters())
    assert max(second_task(model, stepper).values()) <= 1e-4


@each_optimizer
def test_a_bias_that_its_owner_froze_is_no_part_of_the_memory(optimizer):
    model = network()
    model[1].bias.requires_grad_(False)
    bias = model[1].bias.clone()
    guard, optimizer = Guarded(model, GPM(0.9)), OPTIMIZERS[optimizer](model.parameters())
    for t in range(2):
        before, memory = matrices(model), dict(guard.strategy.memory)
        with guard.task(optimizer, sample=data(t)):
            loop(model, optimizer, t)
    after = matrices(model)
    change = (after["1"] - before["1"])[:, :-1].double()
    assert (memory["1"].shape[0], memory["3"].shape[0]) == (64, 41)
    assert torch.equal(model[1].bias, bias)
    assert change.norm() > 1e-3
    assert (change @ memory["1"]).norm() < 1e-4 * change.norm()


@pytest.mark.parametrize("optimizer", ["momentum", "Adam", "AdamW"])
def test_projecting_gradients_alone_would_leak(optimizer):
    model = network()
    stepper = OPTIMIZERS[optimizer](model.parameters())
    strategy = GPM(threshold=0.97, project="gradient")
    assert max(second_task(model, stepper, strategy).values()) > 1e-2


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize(
    "options", [{"accumulate": 3, "clip": 0.1}, {"closure": True}], ids=["accumulated", "closure"]
)
def test_plain_loop_with_more_in_it(optimizer, options):
    model = network()
    stepper = OPTIMIZERS[optimizer](model.parameters())
    assert max(second_task(model, stepper, **options).values()) <= 1e-4


def test_accumulated_batches_are_one_large_batch():
    found = []
    for size, accumulate in ((60, 1), (20, 3)):
        model = network()
        guard = Guarded(model, GPM(threshold=0.97))
        for t in range(2):
            x, y = data(t)
            optimizer = SGD(model.parameters(), lr=0.1)
            with guard.task(optimizer, sample=(x, y)):
                for i, rows in enumerate(torch.arange(960).split(size), start=1):
                    (F.cross_entropy(model(x[rows]), y[rows]) / accumulate).backward()
                    if i % accumulate == 0:
                        optimizer.step()
                        optimizer.zero_grad()
        found.append(matrices(model))
    for one, other in zip(found[0].values(), found[1].values(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("manual", [False, True])
@each_optimizer
def test_callback_keeps_the_weight_change_out_of_old_inputs(optimizer, manual):
    module = Module(network(), OPTIMIZERS[optimizer], manual)
    strategy = GPM(threshold=0.97)
    trainer(guard_of(strategy, 0)).fit(module, loader(0))
    memory, before = dict(strategy.memory), matrices(module)
    options = {} if manual else {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}
    trainer(guard_of(strategy, 1), epochs=4, **options).fit(module, loader(1))
    assert max(leaks(memory, before, matrices(module)).values()) <= 1e-4


def test_mixed_precision_of_the_trainer():
    module = Module(network(), OPTIMIZERS["Adam"])
    strategy = GPM(threshold=0.97)
    trainer(guard_of(strategy, 0), precision="bf16-mixed").fit(module, loader(0))
    memory, before = dict(strategy.memory), matrices(module)
    trainer(guard_of(strategy, 1), precision="bf16-mixed").fit(module, loader(1))
    assert max(leaks(memory, before, matrices(module)).values()) <= 1e-4


class Rebuilds(lightning.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        trainer.strategy.setup_optimizers(trainer)


def test_an_optimizer_that_is_rebuilt_meanwhile_is_watched_too():
    module = Module(network(), OPTIMIZERS["Adam"])
    strategy = GPM(threshold=0.97)
    trainer(guard_of(strategy, 0)).fit(module, loader(0))
    memory, before = dict(strategy.memory), matrices(module)
    trainer(guard_of(strategy, 1), Rebuilds()).fit(module, loader(1))
    assert max(leaks(memory, before, matrices(module)).values()) <= 1e-4


def test_less_is_forgotten():
    forgotten = {}
    for name, strategy in (("free", Finetune()), ("guarded", GPM(threshold=0.97))):
        for kind in ("plain", "lightning"):
            model = network()
            if kind == "plain":
                guard, optimizer = Guarded(model, strategy), Adam(model.parameters(), lr=2e-3)
                with guard.task(optimizer, sample=data(0)):
                    loop(model, optimizer, 0, epochs=8)
                learned = accuracy(model, 0)
                with guard.task(optimizer, sample=data(1)):
                    loop(model, optimizer, 1, epochs=8)
            else:
                strategy = copy.deepcopy(strategy)
                strategy.load_state_dict(type(strategy)().state_dict())
                module = Module(model, OPTIMIZERS["Adam"])
                trainer(guard_of(strategy, 0), epochs=8).fit(module, loader(0))
                learned = accuracy(model, 0)
                trainer(guard_of(strategy, 1), epochs=8).fit(module, loader(1))
            assert learned > 0.85
            assert accuracy(model, 1) > 0.6
            forgotten[kind, name] = learned - accuracy(model, 0)
    for kind in ("plain", "lightning"):
        assert forgotten[kind, "guarded"] < forgotten[kind, "free"] - 0.15, forgotten


# -- the model is left as it was found ------------------------------------------------------------


def condition(model):
    return (
        list(model.state_dict()),
        [(name, type(m), m.training) for name, m in model.named_modules()],
        [(name, p.requires_grad) for name, p in model.named_parameters()],
        [sorted(m.__dict__) for m in model.modules()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
    )


def hooks(optimizer):
    found = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    everywhere = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)
    return sum(map(len, (*found, *everywhere)))


def test_model_and_optimizer_are_untouched():
    model = normalised().train()
    model[4].bias.requires_grad_(False)
    optimizer = Adam(model.parameters())
    found = condition(model)
    guard = Guarded(model, GPM(threshold=0.97))
    for t in range(2):
        with guard.task(optimizer, sample=data(t)):
            loop(model, optimizer, t, epochs=1)
        assert condition(model) == found
        assert hooks(optimizer) == 0


def test_norms_stay_as_they_are_after_the_first_task_even_if_the_loop_calls_train():
    model = normalised()
    optimizer = AdamW(model.parameters(), weight_decay=0.1)
    guard = Guarded(model, GPM(threshold=0.97))
    with guard.task(optimizer, sample=data(0)):
        loop(model, optimizer, 0, epochs=1)
    before = {name: v.clone() for name, v in model[1].state_dict().items()}
    assert before["num_batches_tracked"] > 0
    with guard.task(optimizer, sample=data(1)):
        loop(model, optimizer, 1, epochs=1)
        twin = copy.deepcopy(model)
        twin.train()
        assert not twin[1].training
        torch.save(model, io.BytesIO())
    assert all(torch.equal(before[name], v) for name, v in model[1].state_dict().items())
    assert model[1].training


def test_frozen_weights_keep_still_though_the_optimizer_holds_them():
    model = network()
    optimizer = AdamW(model.parameters(), weight_decay=0.1)
    guard = Guarded(model, Freeze(n_blocks=1))
    with guard.task(optimizer, sample=data(0)):
        loop(model, optimizer, 0, epochs=1)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
    before = matrices(model)
    with guard.task(optimizer, sample=data(1)):
        optimizer.step()
        loop(model, optimizer, 1, epochs=1)
    after = matrices(model)
    assert torch.equal(before["1"], after["1"])
    assert not torch.equal(before["3"], after["3"])
    assert all(p.requires_grad for p in model.parameters())


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("error", [RuntimeError, Interrupted])
def test_an_exception_releases_and_is_not_remembered(error):
    model = normalised()
    optimizer = SGD(model.parameters(), lr=0.1)
    strategy = GPM(threshold=0.97)
    guard = Guarded(model, strategy)
    with guard.task(optimizer, sample=data(0)):
        loop(model, optimizer, 0, epochs=1)
    memory, found = dict(strategy.memory), condition(model)

    def break_off():
        loop(model, optimizer, 1, epochs=1)
        raise error

    with pytest.raises(error), guard.task(optimizer, sample=data(1)):
        break_off()
    assert condition(model) == found
    assert hooks(optimizer) == 0
    assert strategy.confinement is None
    assert strategy.memory == memory
    assert guard.tasks == 1
    with guard.task(optimizer, sample=data(1)):
        loop(model, optimizer, 1, epochs=1)
    assert guard.tasks == 2


class Fails(Strategy):
    def setup(self, learner, task):
        learner.hold(learner.blocks())
        raise RuntimeError("no")


def test_a_setup_that_fails_leaves_nothing_behind():
    model = normalised()
    found, optimizer = condition(model), SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(RuntimeError, match="no"),
        Guarded(model, Fails()).task(optimizer, sample=data(0)),
    ):
        pytest.fail("entered")
    assert condition(model) == found
    assert hooks(optimizer) == 0


class Breaks(lightning.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        raise RuntimeError("broken")


def test_callback_leaves_the_module_as_it_was():
    module = Module(normalised(), OPTIMIZERS["AdamW"])
    strategy = GPM(threshold=0.97)
    found = condition(module.network)
    trainer(guard_of(strategy, 0), epochs=1).fit(module, loader(0))
    assert condition(module.network) == found
    memory = dict(strategy.memory)
    before = {name: v.clone() for name, v in module.network[1].state_dict().items()}
    with pytest.raises(RuntimeError, match="broken"):
        trainer(guard_of(strategy, 1), Breaks()).fit(module, loader(1))
    assert condition(module.network) == found
    assert strategy.memory == memory
    assert strategy.confinement is None
    trainer(guard_of(strategy, 1), epochs=1).fit(module, loader(1))
    assert condition(module.network) == found
    assert all(torch.equal(before[k], v) for k, v in module.network[1].state_dict().items())


# -- saving and resuming --------------------------------------------------------------------------


def test_the_state_of_a_plain_guard_travels():
    strategy, model = GPM(threshold=0.97), network()
    optimizer = SGD(model.parameters(), lr=0.1)
    guard = Guarded(model, strategy)
    with guard.task(optimizer, sample=data(0)):
        loop(model, optimizer, 0)
    saved = io.BytesIO()
    torch.save(guard.state_dict(), saved)
    saved.seek(0)
    twin = copy.deepcopy(model)
    other = Guarded(twin, GPM(threshold=0.97))
    other.load_state_dict(torch.load(saved, weights_only=True))
    assert other.tasks == 1
    for m, g in ((model, guard), (twin, other)):
        optimizer = SGD(m.parameters(), lr=0.1)
        with g.task(optimizer, sample=data(1)):
            loop(m, optimizer, 1)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)
    )


def test_checkpoints_carry_the_memory(tmp_path):
    module, strategy = Module(network(), OPTIMIZERS["Adam"]), GPM(threshold=0.97)
    first = trainer(guard_of(strategy, 0))
    first.fit(module, loader(0))
    first.save_checkpoint(tmp_path / "first.ckpt")
    memory = dict(strategy.memory)
    second = trainer(
        guard_of(strategy, 1),
        ModelCheckpoint(tmp_path, filename="half", every_n_epochs=1, save_top_k=-1),
        epochs=1,
        enable_checkpointing=True,
    )
    second.fit(module, loader(1))
    half = tmp_path / "half.ckpt"

    # Another process: a new module, a strategy without memory.
    other, resumed = Module(network(), OPTIMIZERS["Adam"]), GPM(threshold=0.97)
    again = trainer(guard_of(resumed, 1), epochs=3)
    again.fit(other, loader(1), ckpt_path=half)
    assert again.global_step == 3 * len(loader(1))
    start = Module(network(), OPTIMIZERS["Adam"])
    start.load_state_dict(torch.load(tmp_path / "first.ckpt", weights_only=True)["state_dict"])
    assert max(leaks(memory, matrices(start), matrices(other)).values()) <= 1e-4
    assert all(resumed.memory[n].shape[1] >= M.shape[1] for n, M in memory.items())

    third = ContinualCallback(GPM(), sample=data(1), task=2)
    with pytest.raises(UsageError, match="wrote after the task before"):
        trainer(third).fit(other, loader(1), ckpt_path=half)
    with pytest.raises(UsageError, match="task=1"):
        trainer(guard_of(GPM(), 0), epochs=9).fit(
            other, loader(0), ckpt_path=tmp_path / "first.ckpt"
        )


# -- what is refused ------------------------------------------------------------------------------


class EveryEpoch(Strategy):
    def after_epoch(self, learner, task, progress):
        return None


REFUSED = {
    "adds to the loss": EWC(),
    "changes the batches": ER(),
    "chooses the training data": Joint(),
    "acts at the end of epochs": EveryEpoch(),
    "Freeze acts at the end of epochs": Freeze(early_stop=0.9),
    "needs the task id": TRGP(),
    "project='input'": GPM(project="input"),
    "adds to the loss|changes": Together({"gpm": GPM(), "ewc": EWC()}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_strategies_that_need_the_loop_are_refused(reason):
    with pytest.raises(UsageError, match=reason):
        Guarded(network(), REFUSED[reason])
    with pytest.raises(UsageError, match=reason):
        guard_of(REFUSED[reason], 0)


@pytest.mark.parametrize(
    ("model", "strategy", "said"),
    [
        (network, GPM, "strategy=<class .*GPM'>: give an object"),
        (network, "gpm", "strategy='gpm': give an object"),
        (lambda: nn.Linear, GPM(), "model=<class .*Linear'>: give a torch.nn.Module"),
    ],
)
def test_what_is_no_strategy_and_what_is_no_network(model, strategy, said):
    with pytest.raises(UsageError, match=said):
        Guarded(model(), strategy)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(17, 6)
        self.out = nn.Linear(6, 10)

    def forward(self, tokens):
        return self.out(self.embedding(tokens)).mean(1)


def test_padding_is_not_remembered():
    model, (x, y) = Tokens(), data(0)
    tokens = (x.flatten(1) * 4).long().clamp(0, 15)
    padded = torch.cat([tokens, torch.full_like(tokens, 16)], dim=1)
    mask = torch.cat([torch.ones_like(tokens), torch.zeros_like(tokens)], dim=1)
    protect = Protect(exclude=("embedding",), bias="free")
    guard = Guarded(
        model,
        GPM(protect=protect),
        forward=lambda model, batch: model(batch["input_ids"]),
    )
    optimizer = SGD(model.out.parameters(), lr=0.1)
    with guard.task(optimizer, sample={"input_ids": padded, "attention_mask": mask}):
        F.cross_entropy(model(padded), y).backward()
        optimizer.step()
    assert guard.strategy.rows_per_sample["out"] == tokens.shape[1]


def test_scaled_projection_is_served():
    model, strategy = network(), SGP(threshold=0.97)
    optimizer = Adam(model.parameters(), lr=2e-3)
    guarded = second_task(model, optimizer, strategy)
    model = network()
    free = Guarded(model, Finetune())
    optimizer = Adam(model.parameters(), lr=2e-3)
    with free.task(optimizer, sample=data(0)):
        loop(model, optimizer, 0)
    first = {name: M[:, : len(strategy.importance[name])] for name, M in strategy.memory.items()}
    before = matrices(model)
    with free.task(optimizer, sample=data(1)):
        loop(model, optimizer, 1)
    loose = leaks(first, before, matrices(model))
    assert all(guarded[name] < 0.7 * loose[name] for name in guarded)


def test_companions_that_need_nothing_are_served():
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    gpm = GPM()
    guard = Guarded(model, Together({"gpm": gpm, "freeze": Freeze(n_blocks=1)}))
    with guard.task(optimizer, sample=data(0)):
        loop(model, optimizer, 0, epochs=1)
    memory, before = dict(gpm.memory), matrices(model)
    with guard.task(optimizer, sample=data(1)):
        loop(model, optimizer, 1, epochs=1)
    after = matrices(model)
    frozen = [name for name in before if torch.equal(before[name], after[name])]
    assert len(frozen) == 1
    moved = {name: M for name, M in memory.items() if name not in frozen}
    assert moved
    assert all(leak < 1e-5 for leak in leaks(moved, before, after).values())


x_of_two = torch.zeros(2, 1, 8, 8)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ((x_of_two, torch.zeros(3)), "as many rows"),
        (x_of_two[:0], "as many rows"),
        ([1, 2], "give tensors"),
        ((x_of_two, x_of_two, x_of_two), "give tensors"),
        (torch.zeros(2, 3), "does not take the sample"),
        ({"input_ids": torch.zeros(2, 64)}, "forward=lambda"),
    ],
)
def test_samples_that_do_not_fit(sample, message):
    model = network()
    found = condition(model)
    optimizer = SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(UsageError, match=message),
        Guarded(model, GPM()).task(optimizer, sample=sample),
    ):
        pytest.fail("entered")
    assert condition(model) == found
    with pytest.raises(UsageError, match=message):
        trainer(ContinualCallback(GPM(), sample=sample, task=0)).fit(
            Module(model, OPTIMIZERS["SGD"]), loader(0)
        )


def test_named_samples_and_other_ways_to_call():
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    guard = Guarded(model, GPM(), forward=lambda model, batch: model(batch["pixels"]))
    with guard.task(optimizer, sample={"pixels": data(0)[0]}):
        loop(model, optimizer, 0, epochs=1)
    assert set(guard.strategy.memory) == {"1", "3"}


def test_optimizers_that_the_guard_cannot_see():
    model = network()
    optimizer, other = SGD(model.parameters(), lr=0.1), Adam(model.parameters())
    guard = Guarded(model, GPM())
    foreign = SGD(network().parameters(), lr=0.1)
    for given, message in (
        ((), "give the optimizer"),
        ((model,), "no torch.optim.Optimizer"),
        ((foreign,), "none of the model's parameters"),
    ):
        with pytest.raises(UsageError, match=message), guard.task(*given, sample=data(0)):
            pytest.fail("entered")
    with pytest.raises(UsageError, match="was not given"), guard.task(optimizer, sample=data(0)):
        loop(model, other, 0)
    with (
        pytest.raises(UsageError, match="no given optimizer"),
        guard.task(optimizer, sample=data(0)),
    ):
        pass
    with (
        pytest.raises(UsageError, match="open already"),
        guard.task(optimizer, sample=data(0)),
        guard.task(optimizer, sample=data(0)),
    ):
        pytest.fail("entered")
    assert hooks(optimizer) == hooks(other) == 0
    assert guard.tasks == 0
    with guard.task(optimizer, other, sample=data(0)):
        loop(model, optimizer, 0, epochs=1)
        loop(model, other, 0, epochs=1)
        foreign.step()


class Wrapper(torch.optim.Optimizer):
    """An optimizer around another one, as many libraries have them."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure=None):
        return self.inner.step(closure)


def test_an_optimizer_around_the_given_one_is_seen_through():
    model = network()
    inner = SGD(model.parameters(), lr=0.1)
    strategy = GPM()
    guard = Guarded(model, strategy)
    with guard.task(inner, sample=data(0)):
        loop(model, Wrapper(inner), 0, epochs=1)
    memory, before = dict(strategy.memory), matrices(model)
    with guard.task(inner, sample=data(1)):
        loop(model, Wrapper(inner), 1, epochs=1)
    assert all(leak < 1e-5 for leak in leaks(memory, before, matrices(model)).values())


def test_several_evaluations_a_step_are_refused():
    model = network()
    optimizer = LBFGS(model.parameters(), max_iter=4)
    with (
        pytest.raises(UsageError, match="several times a step"),
        Guarded(model, GPM()).task(optimizer, sample=data(0)),
    ):
        loop(model, optimizer, 0, closure=True)
    module = Module(network(), functools.partial(LBFGS, max_iter=4))
    with pytest.raises(UsageError, match="several times a step"):
        trainer(guard_of(GPM(), 0)).fit(module, loader(0))


def test_networks_that_cannot_be_guarded():
    normed = nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(64, 10)))
    optimizer = SGD(normed.parameters(), lr=0.1)
    with (
        pytest.raises(UsageError, match="computes its weight"),
        Guarded(normed, GPM()).task(optimizer, sample=data(0)),
    ):
        pytest.fail("entered")
    with pytest.raises(UsageError, match="give the module itself"):
        Guarded(torch.compile(network(), backend="eager"), GPM())
    model = network()
    guard = Guarded(model, GPM(protect=Protect(heads="never")))
    optimizer = SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(UsageError, match="name them"),
        guard.task(optimizer, sample=data(0)),
    ):
        pytest.fail("entered")


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRU(8, 12, batch_first=True)
        self.out = nn.Linear(12, 10)

    def forward(self, x):
        return self.out(self.cell(x.squeeze(1))[0][:, -1])


def test_layers_that_stay_free_are_named_once():
    model = Recurrent()
    optimizer = SGD(model.parameters(), lr=0.1)
    guard = Guarded(model, GPM())
    with (
        pytest.warns(UserWarning, match=r"cell \(GRU\)"),
        guard.task(optimizer, sample=data(0)),
    ):
        loop(model, optimizer, 0, epochs=1)
    quiet = Guarded(model, GPM(protect=Protect(exclude=("cell",))))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for g in (guard, quiet):
            with g.task(optimizer, sample=data(1)):
                loop(model, optimizer, 1, epochs=1)


def test_the_next_task_goes_on_from_the_checkpoint_of_the_one_before(tmp_path):
    module = Module(network(), OPTIMIZERS["Adam"])
    first = trainer(guard_of(GPM(threshold=0.97), 0))
    first.fit(module, loader(0))
    first.save_checkpoint(tmp_path / "first.ckpt")
    before = matrices(module)
    other, strategy = Module(network(), OPTIMIZERS["Adam"]), GPM(threshold=0.97)
    with pytest.raises(UsageError, match="max_epochs"):
        trainer(guard_of(strategy, 1)).fit(other, loader(1), ckpt_path=tmp_path / "first.ckpt")
    memory = dict(strategy.memory)
    trainer(guard_of(strategy, 1), epochs=4).fit(
        other, loader(1), ckpt_path=tmp_path / "first.ckpt"
    )
    assert max(leaks(memory, before, matrices(other)).values()) <= 1e-4


def test_a_checkpoint_of_the_last_epoch_is_enough_to_consolidate(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="last", every_n_epochs=1)
    made, strategy = Module(network(), OPTIMIZERS["Adam"]), GPM()
    trainer(guard_of(strategy, 0), keep, enable_checkpointing=True).fit(made, loader(0))
    resumed = GPM()
    again = trainer(guard_of(resumed, 0))
    again.fit(Module(network(), OPTIMIZERS["Adam"]), loader(0), ckpt_path=tmp_path / "last.ckpt")
    for name, M in strategy.memory.items():
        torch.testing.assert_close(M @ M.t(), resumed.memory[name] @ resumed.memory[name].t())


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_gradient_scaling(optimizer):
    model, strategy = network(), GPM(threshold=0.97)
    stepper = OPTIMIZERS[optimizer](model.parameters())
    scaler = torch.amp.GradScaler("cpu")
    guard = Guarded(model, strategy)
    for t in range(2):
        (x, y), memory, before = data(t), dict(strategy.memory), matrices(model)
        with guard.task(stepper, sample=(x, y)):
            for i, rows in enumerate(torch.randperm(len(x)).split(32)):
                stepper.zero_grad()
                scaler.scale(F.cross_entropy(model(x[rows]), y[rows])).backward()
                if i == 3:
                    model[1].weight.grad[0, 0] = torch.inf  # the scaler leaves this step out
                scaler.step(stepper)
                scaler.update()
    assert max(leaks(memory, before, matrices(model)).values()) <= 1e-4


def test_one_process_only(monkeypatch):
    many = types.SimpleNamespace(strategy=None, world_size=2)
    with pytest.raises(UsageError, match="devices=1"):
        guard_of(GPM(), 0).setup(many, Module(network(), OPTIMIZERS["SGD"]), "fit")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    model = network()
    with (
        pytest.raises(UsageError, match="one process"),
        Guarded(model, GPM()).task(SGD(model.parameters(), lr=0.1), sample=data(0)),
    ):
        pytest.fail("entered")


def test_trainers_that_do_not_fit():
    module = Module(network(), OPTIMIZERS["SGD"])
    with pytest.raises(UsageError, match="'norm'"):
        trainer(guard_of(GPM(), 0), gradient_clip_val=0.1, gradient_clip_algorithm="value").fit(
            module, loader(0)
        )
    done = guard_of(GPM(), 0)
    trainer(done, epochs=1).fit(module, loader(0))
    with pytest.raises(UsageError, match="is learned"):
        trainer(done, epochs=1).fit(module, loader(0))


def test_compiled_networks_keep_their_norms():
    model = normalised()
    compiled = torch.compile(model, backend="eager")
    optimizer = Adam(model.parameters())
    guard = Guarded(model, GPM(threshold=0.97))
    with guard.task(optimizer, sample=data(0)):
        loop(compiled, optimizer, 0, epochs=1)
    before = {name: v.clone() for name, v in model[1].state_dict().items()}
    with guard.task(optimizer, sample=data(1)):
        loop(compiled, optimizer, 1, epochs=1)
    assert all(torch.equal(before[name], v) for name, v in model[1].state_dict().items())
