"""Rates within a task: decay on plateau with the best epoch restored, and torch's schedulers."""

import functools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR
from toys import make_engine, make_learner, make_stream, mlp

from cl_bench.contracts import EpochDecision, Plan, Strategy, UsageError
from cl_bench.experiment import Cosine, LoopSettings, Plateau, Warmup
from cl_bench.experiment.plateau import BestEpoch
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.strategies.projection.rogo import ROGO
from cl_bench.strategies.projection.trgp import TRGP
from cl_bench.strategies.replay.er import ER


class Events:
    """Keeps the epochs that the engine reports."""

    def __init__(self):
        self.epochs, self.lines = [], []

    def steps(self, task, batches, train_loss, learning_rate, phase):
        self.lines.append({"batches": batches, "loss": train_loss, "rate": learning_rate})

    def epoch(self, *_, **event):
        if event:
            self.epochs.append(event)

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def hard_stream(tasks=1):
    """Labels that have nothing to do with the inputs: losses go up and down."""
    stream = make_stream(tasks=tasks, n=44)
    for task in stream:
        y = task.data.tensors["y"]
        y.copy_(y[torch.randperm(len(y), generator=torch.Generator().manual_seed(3))])
    return stream


def run(strategy, schedule, *, lr=0.05, epochs=6, pack=1, stream=None, tasks=1):
    stream = stream or make_stream(tasks=tasks, n=44)
    learner = make_learner(stream, mlp(), functools.partial(SGD, lr=lr), pack=pack)
    engine = make_engine(learner, strategy, epochs, pack)
    settings = LoopSettings(batch_size=10, pack=pack, schedule=schedule)
    events = Events()
    engine = type(engine)(learner, strategy, engine.trainer, settings, None, events, events)
    for task in stream:
        engine.learn(task, Plan(task.train))
    return learner, events.epochs


def published_rule(losses, rate, factor, patience, least):
    """Rates of the epochs, and the best one, by the loop of the authors' main_cifar100.py."""
    lowest, waiting, best, rates = math.inf, patience, None, []
    for epoch, loss in enumerate(losses):
        rates.append(rate)
        if loss < lowest:
            lowest, waiting, best = loss, patience, epoch
            continue
        waiting -= 1
        if waiting <= 0:
            rate *= factor
            if rate < least:
                break
            waiting = patience
    return rates, best


@given(
    st.lists(st.sampled_from([1.0, 2.0, 3.0, 4.0, math.inf]), min_size=1, max_size=40),
    st.integers(1, 4),
)
def test_patience_runs_out_as_in_the_published_loop(losses, patience):
    learner = make_learner(make_stream(tasks=1))
    following = BestEpoch(Plateau(0.5, patience, 0.1, restore_best=False), learner, Strategy())
    rate, rates = 1.0, []
    for loss in losses:
        rates.append(rate)
        if following.after_epoch(loss):
            rate *= 0.5
            if rate < 0.1:
                break
    assert rates == published_rule(losses, 1.0, 0.5, patience, 0.1)[0]


@pytest.mark.parametrize("pack", [1, 3])
def test_the_rate_follows_the_validation_loss_and_the_best_epoch_stays(pack):
    schedule = Plateau(factor=0.5, patience=1, min_rate=0.05)
    stream = hard_stream()
    learner, epochs = run(Finetune(), schedule, lr=2.0, epochs=5, pack=pack, stream=stream)
    losses = [e["validation_loss"] for e in epochs]
    rates, best = published_rule(losses, 2.0, 0.5, 1, 0.05)
    assert [e["learning_rate"] for e in epochs] == pytest.approx(rates)
    assert len(set(rates)) > 2
    assert best < len(losses) - 1  # so that there is something to go back to
    task = stream[0]
    learner.eval()
    with torch.no_grad():
        kept = float(learner.loss(learner(task.everything), task.everything))
    assert kept == pytest.approx(min(losses), rel=1e-5)


def test_a_task_ends_below_the_least_rate():
    schedule = Plateau(factor=0.1, patience=1, min_rate=0.5)
    _, epochs = run(Finetune(), schedule, lr=2.0, epochs=50, stream=hard_stream())
    assert len(epochs) < 50
    assert {e["learning_rate"] for e in epochs} == {2.0}


def test_without_restoring_the_last_epoch_stays():
    schedule = Plateau(factor=0.5, patience=1, min_rate=0.0, restore_best=False)
    stream = hard_stream()
    learner, epochs = run(Finetune(), schedule, lr=2.0, epochs=8, stream=stream)
    task = stream[0]
    learner.eval()
    with torch.no_grad():
        kept = float(learner.loss(learner(task.everything), task.everything))
    assert kept == pytest.approx(epochs[-1]["validation_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("make", "scenario"),
    [
        (lambda: GPM(samples=20), "domain"),
        (lambda: ROGO(samples=20, relax_samples=20, cosine=0.2), "domain"),
        (lambda: TRGP(samples=20, trust=0.01), "task"),
        (lambda: ER(memory=20), "domain"),
    ],
)
def test_strategy_and_weights_go_back_to_the_same_epoch(make, scenario, monkeypatch):
    """With losses that rise from the third epoch on, a task ends as if it had two epochs."""
    losses = iter([])

    def made_up(self):
        return next(losses)

    monkeypatch.setattr("cl_bench.learners.BaseLearner.validation_loss", made_up)
    ended = []
    for epochs in (2, 5):
        stream = make_stream(scenario, tasks=2, n=44)
        learner = make_learner(stream, mlp(), functools.partial(SGD, lr=0.05))
        strategy = make()
        schedule = Plateau(patience=10, min_rate=0.0)
        base = make_engine(learner, strategy, epochs)
        settings = LoopSettings(batch_size=10, schedule=schedule)
        engine = type(base)(learner, strategy, base.trainer, settings, None, Events(), Events())
        for task in stream:
            losses = iter([3.0, 2.0, 4.0, 5.0, 6.0])
            # ROGO relaxes after every epoch but the last: here not after the second either.
            if isinstance(strategy, ROGO):
                strategy.rounds = 1
            engine.learn(task, Plan(task.train))
        ended.append({name: p.detach().clone() for name, p in learner.named_parameters()})
    for name, weight in ended[0].items():
        assert torch.equal(weight, ended[1][name]), name


class Watching(Strategy):
    """Notes what it is told."""

    def __init__(self):
        self.told = []

    def after_epoch(self, learner, task, progress):
        self.told.append(progress)
        return EpochDecision(reset_rate=True) if len(self.told) == 4 else None


def test_strategies_are_told_of_a_plateau_and_may_reset_the_rate(monkeypatch):
    losses = iter([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    monkeypatch.setattr("cl_bench.learners.BaseLearner.validation_loss", lambda self: next(losses))
    strategy = Watching()
    _, epochs = run(strategy, Plateau(0.5, 1, 0.0), lr=0.08, epochs=6)
    assert [p.plateau for p in strategy.told] == [False, True, True, True, True, True]
    assert [p.learning_rate for p in strategy.told] == pytest.approx(
        [0.08, 0.04, 0.02, 0.01, 0.04, 0.02]
    )
    assert epochs[4]["learning_rate"] == pytest.approx(0.08)


def test_without_a_plateau_nothing_is_said_of_one():
    strategy = Watching()
    run(strategy, None, epochs=2)
    assert [p.plateau for p in strategy.told] == [None, None]


@pytest.mark.parametrize("rounds", [1, 2])
def test_rogo_relaxes_on_a_plateau_at_a_low_rate_and_starts_over(rounds, monkeypatch):
    losses = iter([1.0] * 100)
    monkeypatch.setattr("cl_bench.learners.BaseLearner.validation_loss", lambda self: next(losses))
    monkeypatch.setattr(ROGO, "relax", lambda self, learner, task, epoch: 1)
    strategy = ROGO(samples=20, schedule="plateau", relax_below=0.015, rounds=rounds)
    _, epochs = run(strategy, Plateau(0.5, 1, 0.004), lr=0.05, epochs=20, tasks=2)
    rates = [round(e["learning_rate"], 5) for e in epochs if e["task"] == 1]
    # Relaxed where the halved rate is at most 0.015; then from the beginning, `rounds` times.
    down = [0.05, 0.05, 0.025]
    again = [0.05, 0.025]
    tail = [0.05, 0.025, 0.0125, 0.00625]
    assert rates == down + again * (rounds - 1) + tail


@pytest.mark.parametrize("pack", [1, 3])
@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        (functools.partial(MultiStepLR, milestones=[1, 3], gamma=0.1), [1, 0.1, 0.1, 0.01]),
        (
            functools.partial(CosineAnnealingLR, T_max=4),
            [(1 + math.cos(math.pi * e / 4)) / 2 for e in range(4)],
        ),
    ],
)
def test_schedulers_of_torch_step_once_an_epoch(pack, factory, expected):
    _, epochs = run(Finetune(), factory, lr=0.1, epochs=4, pack=pack, tasks=2)
    assert [e["learning_rate"] for e in epochs] == pytest.approx([0.1 * x for x in expected * 2])


class Rates(Strategy):
    """Notes the rate of every step."""

    def __init__(self):
        self.seen = []

    def constrain(self, learner):
        (group,) = learner.trainer.optimizers[0].param_groups
        self.seen.append(group["lr"])


@pytest.mark.parametrize(("pack", "every", "steps"), [(1, 1, 5), (3, 1, 5), (1, 2, 3)])
def test_a_cosine_is_as_long_as_the_task(pack, every, steps):
    """Tasks of 2 and of 6 epochs, of 5 batches each, where the Trainer has 4 epochs."""
    stream = make_stream(tasks=2, n=44)
    stream[0].epochs, stream[1].epochs = 2, 6
    learner = make_learner(stream, mlp(), functools.partial(SGD, lr=0.1), pack=pack)
    strategy = Rates()
    made = make_engine(learner, strategy, 4, pack, accumulate_grad_batches=every)
    settings = LoopSettings(batch_size=10, pack=pack, schedule=Cosine(eta_min=0.02))
    events = Events()
    engine = type(made)(learner, strategy, made.trainer, settings, None, events, events)
    for task in stream:
        engine.learn(task, Plan(task.train))
    expected = [
        0.02 + 0.08 * (1 + math.cos(math.pi * i / n)) / 2
        for n in (2 * steps, 6 * steps)
        for i in range(n)
    ]
    assert strategy.seen == pytest.approx(expected)
    assert [e["learning_rate"] for e in events.epochs] == pytest.approx(
        [expected[i * steps] for i in range(8)]
    )


def learned_with(schedule, epochs, **settings):
    """Rates of all steps and what was recorded: tasks of so many epochs, 5 batches each."""
    stream = make_stream(tasks=len(epochs), n=44)
    for task, length in zip(stream, epochs, strict=True):
        task.epochs = length
    learner = make_learner(stream, mlp(), functools.partial(SGD, lr=0.1))
    strategy, events = Rates(), Events()
    made = make_engine(learner, strategy, 4)
    settings = LoopSettings(batch_size=10, schedule=schedule, **settings)
    engine = type(made)(learner, strategy, made.trainer, settings, None, events, events)
    for task in stream:
        engine.learn(task, Plan(task.train))
    return strategy.seen, events


@pytest.mark.parametrize(
    ("options", "rising", "then"),
    [
        ({"share": 0.25}, (3, 8), lambda left: left),
        ({"steps": 4, "shape": "constant"}, (4, 4), lambda left: 1.0),
        (
            {"share": 0.2, "shape": "cosine"},
            (2, 6),
            lambda left: (1 - math.cos(math.pi * left)) / 2,
        ),
    ],
)
def test_a_rate_rises_and_falls_over_each_tasks_own_steps(options, rising, then):
    pytest.importorskip("transformers")
    seen, _ = learned_with(Warmup(**options), (2, 6))
    expected = [
        0.1 * (i / up if i < up else then((steps - i) / (steps - up)))
        for steps, up in zip((10, 30), rising, strict=True)
        for i in range(steps)
    ]
    assert seen == pytest.approx(expected)


def test_losses_are_recorded_every_few_steps():
    _, every = learned_with(None, (2, 1), log_steps=1)
    _, some = learned_with(None, (2, 1), log_steps=3)
    assert [e["batches"] for e in every.lines] == [*range(1, 11), *range(1, 6)]
    losses = [e["loss"] for e in every.lines]
    assert {e["rate"] for e in every.lines} == {0.1}
    # An epoch of 44 samples in five batches: 10, 10, 10, 10, 4; an epoch's end ends a line.
    assert [e["batches"] for e in some.lines] == [3, 5, 8, 10, 3, 5]
    for told, start in zip(some.lines[::2], (0, 5, 10), strict=True):
        assert told["loss"] == pytest.approx(sum(losses[start : start + 3]) / 3)
    for told, start in zip(some.lines[1::2], (3, 8, 13), strict=True):
        mean = (10 * losses[start] + 4 * losses[start + 1]) / 14
        assert told["loss"] == pytest.approx(mean)
    _, none = learned_with(None, (1,))
    assert none.lines == []


class Rebuilding(Strategy):
    """Asks for a new optimizer after every epoch."""

    def after_epoch(self, learner, task, progress):
        return EpochDecision(rebuild_optimizer=True)


@pytest.mark.parametrize("pack", [1, 3])
def test_a_schedule_outlives_its_optimizer(pack):
    factory = functools.partial(MultiStepLR, milestones=[1, 3], gamma=0.1)
    _, epochs = run(Rebuilding(), factory, lr=0.1, epochs=4, pack=pack)
    assert [e["learning_rate"] for e in epochs] == pytest.approx([0.1, 0.01, 0.01, 0.001])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"factor": 1.0}, "schedule.factor=1.0"),
        ({"factor": 0.0}, "schedule.factor=0.0"),
        ({"patience": 0}, "schedule.patience=0"),
        ({"min_rate": -1.0}, "schedule.min_rate=-1.0"),
    ],
)
def test_options_are_checked(options, named):
    with pytest.raises(UsageError, match=named):
        Plateau(**options)
    with pytest.raises(UsageError, match=r"schedule\.eta_min=-1"):
        Cosine(eta_min=-1.0)


def test_a_plateau_needs_validation_data():
    stream = make_stream(tasks=1)
    stream[0].__class__ = type("Bare", (type(stream[0]),), {"validation": []})
    with pytest.raises(UsageError, match="no validation samples"):
        run(Finetune(), Plateau(), stream=stream)


def test_on_the_command_line(cli, tmp_path):
    code, _, err = cli(
        "+strategy=rogo", "+stream=split_digits", "stream.num_tasks=2", "schedule=plateau",
        "schedule.patience=1", "strategy.schedule=plateau", "trainer.max_epochs=2",
        f"run_dir={tmp_path}/run",
    )  # fmt: skip
    assert code == 0, err
    events = [json.loads(line) for line in (tmp_path / "run/results.jsonl").open()]
    assert all(0 < e["validation_loss"] < 10 for e in events if e["event"] == "epoch")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["schedule=constant"], "add schedule=plateau"),
        (["schedule=plateau", "schedule.factor=2"], "schedule.factor=2"),
        (["schedule=steps", "+schedule.gama=2"], "schedule.gama=2"),
        (["schedule=plateau", "stream.validation_fraction=0"], "stream.validation_fraction"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(cli, tmp_path, arguments, named):
    code, _, err = cli(
        "+strategy=rogo", "+stream=split_digits", "strategy.schedule=plateau",
        "trainer.max_epochs=2", f"run_dir={tmp_path}/run", *arguments,
    )  # fmt: skip
    assert code != 0
    assert named in err
    assert "Traceback" not in err
