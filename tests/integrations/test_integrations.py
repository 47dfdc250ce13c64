"""Strategies inside loops that are not ours: plain PyTorch and somebody's LightningModule."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import lightning
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from loops import (
    OPTIMIZERS,
    Module,
    data,
    guard_of,
    leaks,
    loader,
    loop,
    matrices,
    network,
    normalised,
    own_cache,  # noqa: F401
    second_task,
    stream,
    trainer,
)
from torch.optim import SGD, Adam
from toys import make_engine

from cl_bench.contracts import Plan
from cl_bench.experiment import TrainLoader
from cl_bench.integrations import Guarded
from cl_bench.learners import Classifier
from cl_bench.models import MLP
from cl_bench.report.page import render_page
from cl_bench.report.study import read_study
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.projection.gpm import GPM

DOCS = Path(__file__).parents[2] / "docs/integrations.md"

each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def accuracy(model, t):
    batch = stream()[t].test[torch.arange(len(stream()[t].test))]
    model.eval()
    with torch.no_grad():
        return float((model(batch["x"]).argmax(1) == batch["y"]).double().mean())


# -- the printed code -----------------------------------------------------------------------------


SNIPPETS = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)


ABOUT = ("plain", "report", "lightning", "transformers", "trl", "accelerate")


def printed(about):
    """The page's example, run."""
    code = SNIPPETS[ABOUT.index(about)]
    namespace = {"__name__": "docs"}
    exec(compile(code, f"{DOCS.name}[{about}]", "exec"), namespace)
    return namespace


def test_the_page_has_these_examples():
    assert len(SNIPPETS) == len(ABOUT)


@pytest.mark.parametrize("about", ["plain", "lightning", "accelerate"])
def test_docs_run_as_printed(about):
    namespace = printed(about)
    model = namespace.get("model") or namespace["module"].network
    strategy = namespace.get("strategy") or namespace["guard"].strategy
    assert [M.shape[1] > 0 for M in strategy.memory.values()] == [True, True]
    assert accuracy(model, 0) > 0.8
    assert accuracy(model, 1) > 0.6


def test_the_report_of_the_docs():
    namespace = printed("report")
    report = namespace["report"]
    assert report.matrix.shape == (3, 2)
    assert report.matrix[1, 0] > 0.8
    assert report.matrix[2, 0] > report.matrix[1, 0] - 0.1
    assert (report.directory / "summary.json").exists()
    assert (report.directory / "accuracy_matrix.png").exists()
    page = render_page(read_study([report.directory]), [report.directory])
    assert "own_loop" in page
    assert "ewc" in page


def test_the_trainer_of_the_docs():
    namespace = printed("transformers")
    assert namespace["guard"].tasks == 2
    assert namespace["guard"].strategy.information


@pytest.mark.slow
def test_the_on_policy_trainer_of_the_docs():
    pytest.importorskip("trl", reason="the example needs trl, which nothing else here does")
    moved = printed("trl")["moved"]
    assert len(moved) == 6
    for way in ("from answers", "by reward", "from itself"):
        for task in ("read_about", "new_1"):
            assert 0 <= moved[way, "GPM"][task] < moved[way, "Finetune"][task] / 10


@pytest.mark.slow
def test_the_docs_in_two_processes(tmp_path):
    script = tmp_path / "script.py"
    check = """
from accelerate.utils import gather_object

found = gather_object([[p.detach().clone() for p in model.parameters()]])
memory = gather_object([guard.strategy.memory])
assert len(found) == 2
assert all(torch.equal(a, b) for a, b in zip(*found))
assert all(torch.equal(memory[0][k], memory[1][k]) for k in memory[0])
rows = {k: v for k, v in guard.strategy.rows_per_sample.items()}
assert set(rows.values()) == {1.0}
"""
    script.write_text(SNIPPETS[ABOUT.index("accelerate")] + check)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    found = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, check=False
    )
    assert found.returncode == 0, found.stderr[-3000:]


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


@pytest.mark.parametrize("inputs", [None, 32])
def test_a_promise_has_layers_project_what_they_read(inputs):
    """The same update; the raw gradient of such a layer never exists."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 4000), torch.nn.ReLU(), torch.nn.Linear(4000, 10)
    ).double()
    strategy = GPM(threshold=0.99, samples=60)
    guard = Guarded(model, strategy, inputs=inputs)
    for t in range(2):
        x, y = data(t)
        x, optimizer = x.double(), SGD(model.parameters(), lr=0.1)
        with guard.task(optimizer, sample=(x, y)):
            at = strategy.confinement.at_inputs
            for rows in torch.arange(320).split(32):
                optimizer.zero_grad()
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
    assert at == ({"1"} if inputs else set())
    PROMISED.setdefault("weights", model[1].weight.detach())
    torch.testing.assert_close(model[1].weight.detach(), PROMISED["weights"], rtol=0, atol=1e-9)


PROMISED = {}


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
    strategy = GPM(threshold=0.97)
    strategy.place = lambda learner: "gradient"  # which options refuse
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
