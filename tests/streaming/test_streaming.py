"""The engine that answers first: no sample helps with itself, drift marks, resume, refusals."""

import functools
import json
import sys

import pytest
import torch
from dying import Killed, Mortal, sgd
from lightning import Trainer
from toys import make_stream, mlp

from cl_bench.contracts import Needs, Strategy, UsageError
from cl_bench.experiment import (
    AlignmentSettings,
    CheckpointSettings,
    EvalSettings,
    Identity,
    LoopSettings,
    Plateau,
    check_pair,
    conduct,
)
from cl_bench.metrics.prequential import windowed
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.baselines.joint import Joint
from cl_bench.strategies.penalty.ewc import EWC
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.strategies.projection.rogo import ROGO
from cl_bench.strategies.replay.er import ER
from cl_bench.strategies.streaming.lite_rvfl import LiteRVFL
from cl_bench.streaming import Streaming, StreamingEngine, check_streaming
from runs import differences, final_weights

SETTINGS = Streaming(warmup=8, window=10, every=10)


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    module = sys.modules["cl_bench.experiment.conduct"]
    monkeypatch.setattr(module, "write_figures", lambda directory: [])
    monkeypatch.setattr(module, "write_probe_figures", lambda directory: [])
    monkeypatch.setattr(module, "print_run", lambda directory, console: None)


def learn(directory, strategy, dies_at=-1, resume=False, every=4, dies_in_task=None):
    stream = make_stream(n=44, tasks=2)
    learner = Mortal(stream, mlp(), sgd, 4, 0)
    learner.dies_at, learner.dies_in_task = dies_at, dies_in_task
    trainer = functools.partial(Trainer, accelerator="cpu", logger=False)
    return conduct(
        stream,
        strategy,
        learner,
        trainer,
        Identity("toy", "strategy", "seed: 0\n", "python -m cl_bench"),
        loop=LoopSettings(0, 4),
        evaluation=EvalSettings(),
        alignment=AlignmentSettings(samples=20, batches=2),
        checkpoint=CheckpointSettings(True, every, 2),
        run_dir=directory,
        resume=resume,
        engine=functools.partial(StreamingEngine, streaming=SETTINGS),
    )


class Peeking(Strategy):
    """Answers with the label that it saw last, which is right for constant labels alone."""

    needs = Needs(engines=frozenset({"streaming"}))
    last = 0

    def observe(self, learner, batch):
        self.last = batch["y"][-1]
        return True

    def predict(self, learner, batch, task):
        return torch.nn.functional.one_hot(self.last.expand(len(batch["y"])), 3).float()


def test_answers_come_before_their_labels(tmp_path):
    strategy = Peeking()
    strategy.last = torch.tensor(0)
    summary = learn(tmp_path / "run", strategy).summary
    # It gains nothing by the label of the current batch: only chance agreements with the last.
    assert summary["prequential_accuracy"] < 0.6
    assert summary["answered"] == 44 * 2 - 8


def test_what_the_record_says_follows_from_single_answers(tmp_path):
    result = learn(tmp_path / "run", Finetune())
    lines = (tmp_path / "run" / "results.jsonl").read_text().splitlines()
    told = [e for e in map(json.loads, lines) if e["event"] == "prequential"]
    assert [e["answered"] for e in told] == [4, 12, 24, 32, 36, 48, 56, 68, 76, 80]
    assert [e["position"] for e in told][-1] == 44
    assert result.summary["drifts"] == [36]
    assert len(result.summary["recovery_samples"]) == 1
    assert told[-1]["accuracy"] == result.summary["prequential_accuracy"]
    assert (tmp_path / "run" / "prequential.png").exists()


@pytest.mark.parametrize("make", [Finetune, GPM, functools.partial(ER, memory=20), LiteRVFL])
def test_killed_and_resumed_it_is_the_same_run(make, tmp_path):
    options = {"samples": 20} if make is GPM else {}
    learn(tmp_path / "whole", make(**options))
    death = {"dies_in_task": 1} if make is LiteRVFL else {"dies_at": 17}
    with pytest.raises(Killed):
        learn(tmp_path / "killed", make(**options), **death)
    learn(tmp_path / "killed", make(**options), resume=True)
    assert differences(tmp_path / "whole", tmp_path / "killed") == []
    one, other = (final_weights(tmp_path / kind) for kind in ("whole", "killed"))
    for weights in (one, other):
        for key in [k for k in weights if "seconds" in k]:
            del weights[key]
    assert one == other


def test_killed_between_samples_a_learner_that_observes_goes_on(tmp_path, monkeypatch):
    learn(tmp_path / "whole", LiteRVFL(groups=1))
    observe, calls = LiteRVFL.observe, []

    def mortal(self, learner, batch):
        calls.append(1)
        if len(calls) == 16:
            raise Killed
        return observe(self, learner, batch)

    monkeypatch.setattr(LiteRVFL, "observe", mortal)
    with pytest.raises(Killed):
        learn(tmp_path / "killed", LiteRVFL(groups=1))
    inside = [p.name for p in (tmp_path / "killed" / "checkpoints").glob("task0001-step*")]
    assert "task0001-step000000004.pt" in inside
    learn(tmp_path / "killed", LiteRVFL(groups=1), resume=True)
    assert differences(tmp_path / "whole", tmp_path / "killed") == []


def test_on_a_still_stream_what_forgets_nothing_is_better_and_after_a_drift_worse():
    """The self-test of forgetting: lambda = 1 against lambda < 1."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(1500, 4, generator=rng).double()
    first = (x @ torch.tensor([1.0, -1, 0.5, 0]).double() > 0).long()
    noise = torch.rand(1500, generator=rng) < 0.2
    still = torch.where(noise, 1 - first, first)
    drifting = torch.where(torch.arange(1500) < 1000, still, 1 - still)
    found = {}
    for theta in (1.0, 1.02):
        for name, labels in (("still", still), ("drift", drifting)):
            learner = LiteRVFL(groups=1, theta=theta)
            learner.grow(2)
            learner.classes = 2
            learner.begin(x[:50], 0)
            right = []
            for i in range(50, 1500):
                right.append(learner.answers(x[i : i + 1]).argmax(1) == labels[i])
                y = torch.nn.functional.one_hot(labels[i : i + 1], 2).double()
                learner.learn(x[i : i + 1], y)
            curve = windowed(torch.cat(right), 400)
            found[name, theta] = float(curve[-1])
    assert found["still", 1.0] > found["still", 1.02]
    assert found["drift", 1.0] < found["drift", 1.02] - 0.2


class Phased(Finetune):
    def phases(self, learner, task):
        return ()


@pytest.mark.parametrize(
    ("strategy", "settings", "options", "schedule", "match"),
    [
        (Finetune(), SETTINGS, {}, Plateau(), "schedule"),
        (Finetune(), Streaming(warmup=44), {}, None, "engine.warmup=44"),
        (LiteRVFL(), Streaming(warmup=1), {}, None, "at least 2"),
        (Phased(), SETTINGS, {}, None, "phases"),
        (ROGO(), SETTINGS, {}, None, "after epochs"),
        (Joint(), SETTINGS, {}, None, "plans task"),
        (Finetune(), SETTINGS, {"accumulate_grad_batches": 2}, None, "a stream is learned"),
    ],
)
def test_what_cannot_be_met_once_is_refused(strategy, settings, options, schedule, match):
    with pytest.raises(UsageError, match=match):
        check_streaming(settings, "it", strategy, make_stream(n=44), options, schedule)


def test_who_observes_asks_for_the_engine():
    with pytest.raises(UsageError, match=r"\+engine=streaming"):
        check_pair("lite_rvfl", LiteRVFL(), make_stream())
    check_pair("lite_rvfl", LiteRVFL(), make_stream(), streaming=True)
    check_pair("ewc", EWC(), make_stream(), streaming=True)
