"""A stranger's loop under every strategy of ``conf/strategy`` makes the weights of our engine."""

import functools
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from cases import NAMES, Setting, make_strategy, reads_text, relative_gap
from torch import nn
from torch.optim import SGD

from cl_bench.contracts import UsageError
from cl_bench.contracts.strategy import overrides
from cl_bench.experiment import TrainLoader
from cl_bench.integrations import Guarded

ROUNDING = 1e-9
EPOCHS = 2

every = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Somebodys(nn.Module):
    """A body and output layers, whose logits stand side by side."""

    def __init__(self, learner):
        super().__init__()
        self.body = learner.backbone
        self.outs = learner.heads

    def forward(self, x):
        h = self.body(x)
        return torch.cat([out(h) for out in self.outs], dim=1)


def refusal(strategy):
    """Why a strategy has no place in this loop; None where it has one."""
    needs = strategy.needs
    if "local" not in needs.engines:
        return "runs in a federation"
    if needs.plateau:
        return "plateau"
    if reads_text(strategy):
        return "an MLP reads no text"
    try:
        strategy.check_elsewhere()
    except UsageError:
        return "in cl_bench's own loop"
    return None


def named(weights):
    """As the stranger's network calls them."""
    swap = {"backbone.": "body.", "heads.": "outs."}
    found = {}
    for name, value in weights.items():
        for old, new in swap.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
        found[name] = value
    return found


@functools.cache
def ours(name):
    """Weights after two tasks of our engine, and what they were before."""
    setting = Setting(name)
    start = {k: v.clone() for k, v in setting.learner.state_dict().items()}
    engine = setting.silent_engine()
    for t in range(2):
        setting.learn(engine, t)
    return start, {k: v.detach().clone() for k, v in setting.learner.weights().items()}, setting


def batches(lesson, task, epoch, seed=0):
    """The order that our loader has."""
    loader = TrainLoader(lesson.data, 16, seed, task)
    loader.epoch = epoch
    return loader


def stranger(name):
    """The loop, with every line that there is."""
    setting = Setting(name)
    model, strategy = Somebodys(setting.learner), setting.strategy
    heads = [f"outs.{i}" for i in range(len(model.outs))]
    guard = Guarded(
        model, strategy, loss=F.cross_entropy, heads=heads, scenario=setting.stream.scenario
    )
    for t, task in enumerate(setting.stream):
        whole = dict(task.train.tensors)
        steps = EPOCHS * 4
        with guard.task(sample=whole, epochs=EPOCHS, steps=steps, classes=task.classes) as lesson:
            optimizer = SGD(guard.param_groups(), lr=0.2)
            for epoch in range(lesson.epochs):
                for batch in batches(lesson, t, epoch):
                    train(guard, model, optimizer, {**batch, "plain": batch["x"]})
                if guard.after_epoch():
                    break
            for number, phase in enumerate(guard.phases(), start=1):
                optimizer = SGD(guard.param_groups(), lr=0.2)
                for epoch in range(phase.epochs):
                    seed = derived(number)
                    for batch in batches(phase, t, epoch, seed):
                        train(guard, model, optimizer, batch)
    return guard, model, setting


def derived(number):
    from cl_bench.contracts import derive_seed

    return derive_seed(0, "phase", number)


def train(guard, model, optimizer, batch):
    model.train()
    batch = guard.on_batch(batch)
    out = model(batch["x"])
    loss = guard.objective(batch, out) + guard.penalty(batch, out)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@every
def test_plain_loop_makes_the_weights_of_our_engine(name):
    why = refusal(make_strategy(name))
    if why == "an MLP reads no text":
        pytest.skip(why)
    if why is not None:
        for inputs in (None, 16):  # no promise helps
            with pytest.raises(UsageError, match=why):
                Guarded(nn.Linear(2, 2), make_strategy(name), heads=["*"], inputs=inputs)
        return
    start, wanted, engine = ours(name)
    guard, model, setting = stranger(name)
    found = dict(model.state_dict())
    wanted, start = named(wanted), named(start)
    own = {k: v for k, v in wanted.items() if k in found}
    assert relative_gap(found, own) < ROUNDING
    extras = guard.state_dict()["extras"]
    theirs = {k: v for part in extras.values() for k, v in part.items()}
    assert len(theirs) == len(wanted) - len(own)
    for key, value in wanted.items():
        if key.startswith("extra."):
            mine = theirs[key.split(".", 2)[2]]
            torch.testing.assert_close(mine, value, atol=1e-9, rtol=1e-9)
    trains = guard.strategy.plan(setting.stream, 0).epochs != 0
    moved = any(not torch.equal(start[k], v) for k, v in own.items())
    assert moved == trains
    asked(guard, model, setting, engine)


def asked(guard, model, setting, engine):
    """What answers at test is the same as well."""
    for task in setting.stream:
        batch = {k: v[:8] for k, v in task.test.tensors.items()}
        told = setting.stream.task_id_at_test
        theirs = guard.predict(batch, task=task.index if told else None)
        learner = engine.learner
        learner.eval()
        known = task if told else None
        with torch.no_grad(), engine.strategy.inference(learner, known):
            wanted = engine.strategy.predict(learner, batch, known)
        torch.testing.assert_close(theirs, wanted, atol=1e-8, rtol=1e-8)


@every
def test_a_line_that_is_left_out_is_named(name):
    """One at a time, of those that the strategy needs."""
    strategy = make_strategy(name)
    if refusal(strategy):
        pytest.skip("refused, see above")
    hooks = ("on_batch", "objective", "penalty", "param_groups", "after_epoch", "phases")
    for hook in hooks:
        if not overrides(strategy, hook):
            continue
        line = {"phases": "for phase in guard.phases"}.get(hook, f"guard.{hook}(")
        with pytest.raises(UsageError, match=re.escape(line)):
            without(name, hook)


def without(name, left):
    """Two tasks of one step and epoch each, by a loop that leaves a line out."""
    setting = Setting(name)
    model = Somebodys(setting.learner)
    heads = [f"outs.{i}" for i in range(len(model.outs))]
    guard = Guarded(
        model,
        setting.strategy,
        loss=F.cross_entropy,
        heads=heads,
        scenario=setting.stream.scenario,
    )
    for task in setting.stream:
        whole = dict(task.train.tensors)
        with guard.task(sample=whole, epochs=1, steps=1, classes=task.classes) as lesson:
            groups = model.parameters() if left == "param_groups" else guard.param_groups()
            optimizer = SGD(groups, lr=0.1)
            batch = lesson.data[torch.arange(16)]
            batch = {**batch, "plain": batch["x"]}
            batch = batch if left == "on_batch" else guard.on_batch(batch)
            out = model(batch["x"])
            loss = F.cross_entropy(out, batch["y"]) if left == "objective" else None
            loss = guard.objective(batch, out) if loss is None else loss
            loss = loss if left == "penalty" else loss + guard.penalty(batch, out)
            loss.backward()
            optimizer.step()
            if left != "after_epoch":
                guard.after_epoch()
            if left != "phases":
                for phase in guard.phases():
                    other = SGD(guard.param_groups(), lr=0.1)
                    batch = phase.data[torch.arange(min(8, len(phase.data)))]
                    guard.objective(batch, model(batch["x"])).backward()
                    other.step()


@pytest.mark.slow
def test_two_processes_come_to_what_one_does():
    script = Path(__file__).parents[1] / "helpers/strangers.py"
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    found = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, check=False
    )
    assert found.returncode == 0, found.stderr[-3000:]


@pytest.mark.parametrize("name", ["hat", "bic", "gpm", "ewc"])
def test_the_state_of_a_guard_is_all_that_the_next_task_needs(name):
    """What a strategy adds to the network travels in it as well."""
    made = []
    for saved in (False, True):
        setting = Setting(name)
        model = Somebodys(setting.learner)
        guard = guard_of(model, setting)
        for t, task in enumerate(setting.stream):
            if saved and t == 1:
                file = io.BytesIO()
                torch.save({"guard": guard.state_dict(), "model": model.state_dict()}, file)
                file.seek(0)
                state = torch.load(file, weights_only=True)
                again = Setting(name)
                model = Somebodys(again.learner)
                guard = guard_of(model, again)
                if overrides(guard.strategy, "plan"):
                    guard.strategy.check(guard.learner)
                model.load_state_dict(state["model"])
                guard.load_state_dict(state["guard"])
            learn_task(guard, model, task, t)
        made.append((dict(model.state_dict()), guard.state_dict()["extras"]))
    (one, its), (other, others) = made
    assert relative_gap(one, other) < ROUNDING
    assert str(its) == str(others)


def guard_of(model, setting):
    heads = [f"outs.{i}" for i in range(len(model.outs))]
    return Guarded(
        model, setting.strategy, loss=F.cross_entropy, heads=heads, scenario=setting.stream.scenario
    )


def learn_task(guard, model, task, t):
    whole = dict(task.train.tensors)
    with guard.task(sample=whole, epochs=1, steps=4, classes=task.classes) as lesson:
        optimizer = SGD(guard.param_groups(), lr=0.2)
        for batch in batches(lesson, t, 0):
            train(guard, model, optimizer, {**batch, "plain": batch["x"]})
        guard.after_epoch()
        for phase in guard.phases():
            optimizer = SGD(guard.param_groups(), lr=0.2)
            for batch in batches(phase, t, 0):
                train(guard, model, optimizer, batch)


def test_a_loop_that_diverges_is_told_so():
    setting = Setting("finetune")
    model = Somebodys(setting.learner)
    guard = guard_of(model, setting)
    task = setting.stream[0]

    def diverge():
        with guard.task(sample=dict(task.train.tensors)) as lesson:
            batch = lesson.data[torch.arange(8)]
            optimizer = SGD(model.parameters(), lr=1e300)
            for _ in range(3):
                F.cross_entropy(model(batch["x"]), batch["y"]).backward()
                optimizer.step()

    with pytest.raises(UsageError, match="not finite"):
        diverge()
    assert guard.tasks == 0
