"""Runs that go on inside a task as if nothing had happened, killed or asked to stop."""

import functools
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from dying import Killed, Mortal, companions, die, learn, momentum, noisy, same, sgd
from sinks import Listening
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import MultiStepLR

from cl_bench.contracts import EpochDecision, Strategy, UsageError
from cl_bench.experiment import Plateau
from cl_bench.experiment.interrupts import Interrupts
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.baselines.joint import Joint
from cl_bench.strategies.isolation.freeze import Freeze
from cl_bench.strategies.penalty.ewc import EWC
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.strategies.projection.rogo import ROGO
from cl_bench.strategies.projection.sgp import SGP
from cl_bench.strategies.projection.trgp import TRGP
from cl_bench.strategies.replay.er import ER
from cl_bench.tracking import Record, read_results
from runs import differences, unseal

pytestmark = pytest.mark.usefixtures("no_pictures")

STEPS = 45  # 3 tasks of 3 epochs of 5 batches, the last of which is smaller


class Restless(Strategy):
    """Halves the rate after every epoch; then trains the last layer alone, and stops early."""

    def __init__(self):
        self.narrow = False

    def setup(self, learner, task):
        self.narrow = False

    def param_groups(self, learner):
        parameters = learner.trainable_parameters()
        return [{"params": [p]} for p in (parameters[-1:] if self.narrow else parameters)]

    def after_epoch(self, learner, task, progress):
        if progress.epoch == 1:
            return EpochDecision(scale_rate=0.5)
        self.narrow = True
        return EpochDecision(rebuild_optimizer=True, stop=task.index == 1)

    def state_dict(self):
        return {"narrow": self.narrow}

    def load_state_dict(self, state):
        self.narrow = state["narrow"]


# --- going on inside a task -----------------------------------------------------------------------


adam = functools.partial(Adam, lr=1e-2)
adamw = functools.partial(AdamW, lr=1e-2, weight_decay=0.1)
gpm = functools.partial(GPM, samples=20)
gpm_steps = functools.partial(GPM, samples=20, project="step")
ewc = functools.partial(EWC, samples=20)
er = functools.partial(ER, memory=30)
last = functools.partial(Joint, when="last")

rogo = functools.partial(ROGO, samples=20, relax_samples=20, cosine=0.3)
sgp = functools.partial(SGP, samples=20)
trgp = functools.partial(TRGP, samples=20)

rogo_plateau = functools.partial(
    ROGO, samples=20, relax_samples=20, cosine=0.3, schedule="plateau", relax_below=1.0
)
wild = functools.partial(SGD, lr=0.4)
hasty = Plateau(factor=0.5, patience=1, min_rate=1e-3)
steps = functools.partial(MultiStepLR, milestones=[1, 2], gamma=0.5)

CASES = {
    "finetune": {"strategy": Finetune, "optimizer": sgd},
    "finetune-packed": {"strategy": Finetune, "optimizer": adam, "pack": 2},
    "finetune-momentum-noisy": {"strategy": Finetune, "optimizer": momentum, "model": noisy},
    "finetune-noisy-packed": {
        "strategy": Finetune,
        "optimizer": momentum,
        "model": noisy,
        "pack": 2,
    },
    "finetune-accumulating": {
        "strategy": Finetune,
        "optimizer": momentum,
        "model": noisy,
        "every": 2,
        "accumulate_grad_batches": 2,
    },
    "finetune-cut-short": {"strategy": Finetune, "optimizer": adam, "limit_train_batches": 3},
    "gpm": {"strategy": gpm, "optimizer": sgd},
    "gpm-adamw": {"strategy": gpm, "optimizer": adamw, "model": noisy},
    "gpm-masters": {"strategy": gpm, "optimizer": adamw, "masters": torch.bfloat16},
    "gpm-packed-momentum": {"strategy": gpm_steps, "optimizer": momentum, "pack": 2},
    "ewc": {"strategy": ewc, "optimizer": momentum},
    "ewc-packed": {"strategy": ewc, "optimizer": sgd, "pack": 2},
    "er": {"strategy": er, "optimizer": adam},
    "er-packed": {"strategy": er, "optimizer": sgd, "pack": 2, "scenario": "class"},
    "freeze": {"strategy": Freeze, "optimizer": momentum, "scenario": "task"},
    "joint": {"strategy": Joint, "optimizer": sgd, "epochs": 1},
    "joint-last": {"strategy": last, "optimizer": adam},
    "rogo": {"strategy": rogo, "optimizer": momentum},
    "rogo-packed": {"strategy": rogo, "optimizer": sgd, "pack": 2},
    "sgp": {"strategy": sgp, "optimizer": adam},
    "trgp": {"strategy": trgp, "optimizer": momentum, "scenario": "task"},
    "trgp-packed": {"strategy": trgp, "optimizer": sgd, "pack": 2, "scenario": "task"},
    "companions": {"strategy": companions, "optimizer": momentum, "pack": 2},
    "companions-noisy": {"strategy": companions, "optimizer": adam, "model": noisy},
    "plateau": {"strategy": rogo_plateau, "optimizer": wild, "epochs": 8, "schedule": hasty},
    "plateau-packed": {
        "strategy": trgp,
        "optimizer": wild,
        "scenario": "task",
        "pack": 2,
        "epochs": 8,
        "schedule": hasty,
    },
    "steps": {"strategy": rogo, "optimizer": momentum, "schedule": steps},
    "steps-packed": {"strategy": er, "optimizer": adam, "pack": 2, "schedule": steps},
    "rates": {"strategy": Restless, "optimizer": momentum},
    "rates-packed": {"strategy": Restless, "optimizer": adam, "pack": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, case):
    options = CASES[case]
    learner, _ = learn(tmp_path / "whole", **options)
    for moment in (0.45, 0.85):
        directory = tmp_path / f"at-{moment}"
        die(directory, dies_at=int(moment * learner.batches), **options)
        learn(directory, resume=True, **options)
        same(tmp_path / "whole", directory)


def test_inputs_projected_ahead_go_on_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr("cl_bench.subspace.confinement.WORTHWHILE", 0)
    options = {"strategy": gpm, "optimizer": sgd, "pack": 2, "every": 2}
    learn(tmp_path / "whole", **options)
    for moment in (18, 33):
        die(tmp_path / str(moment), dies_at=moment, **options)
        learn(tmp_path / str(moment), resume=True, **options)
        same(tmp_path / "whole", tmp_path / str(moment))


def test_every_step_is_a_place_to_go_on_from(tmp_path):
    options = {"strategy": companions, "optimizer": adam, "model": noisy, "every": 1}
    learn(tmp_path / "whole", **options)
    for step in (0, 1, 15, 16, 19, 20, 29, 44):
        die(tmp_path / str(step), dies_at=step, **options)
        learn(tmp_path / str(step), resume=True, **options)
        same(tmp_path / "whole", tmp_path / str(step))
        assert len((tmp_path / str(step) / "resumes.jsonl").read_text().splitlines()) == 1


def test_a_run_may_be_killed_again_and_again(tmp_path):
    options = {"strategy": companions, "optimizer": momentum, "model": noisy, "every": 2}
    learn(tmp_path / "whole", **options)
    die(tmp_path / "run", dies_at=4, **options)
    for _ in range(5):
        die(tmp_path / "run", dies_at=4, resume=True, **options)
    learn(tmp_path / "run", resume=True, **options)
    same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("hook", ["setup", "collect", "consolidate", "metrics"])
def test_killed_between_steps(tmp_path, monkeypatch, hook):
    options = {"strategy": gpm, "optimizer": momentum}
    learn(tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        calls = []
        original = getattr(GPM, hook)

        def dying(self, *arguments):
            calls.append(1)
            if len(calls) == 2:
                raise Killed
            return original(self, *arguments)

        patch.setattr(GPM, hook, dying)
        die(tmp_path / "run", **options)
    learn(tmp_path / "run", resume=True, **options)
    same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("count", range(1, 15))
def test_killed_right_after_an_event_was_recorded(tmp_path, monkeypatch, count):
    learn(tmp_path / "whole", gpm)
    with monkeypatch.context() as patch:
        calls = []
        original = Record._event

        def dying(self, *arguments, **fields):
            original(self, *arguments, **fields)
            calls.append(1)
            if len(calls) == count:
                raise Killed

        patch.setattr(Record, "_event", dying)
        # The first event belongs to opening the record, which takes everything back.
        die(tmp_path / "run", gpm)
    if count == 1:
        assert not (tmp_path / "run" / "results.jsonl").exists()
        learn(tmp_path / "run", gpm)
    else:
        learn(tmp_path / "run", gpm, resume=True)
    same(tmp_path / "whole", tmp_path / "run")


def test_workers_do_not_disturb_random_numbers(tmp_path):
    options = {"optimizer": momentum, "model": noisy}
    learn(tmp_path / "whole", **options)
    die(tmp_path / "run", dies_at=27, num_workers=1, **options)
    learn(tmp_path / "run", resume=True, num_workers=1, **options)
    same(tmp_path / "whole", tmp_path / "run")


def test_checkpoints_change_nothing(tmp_path):
    options = {"strategy": companions, "optimizer": adam, "model": noisy}
    learners = [
        learn(tmp_path / str(every), enabled=every != 0, every=every or None, **options)[0]
        for every in (0, 1, 7)
    ]
    for learner in learners[1:]:
        for a, b in zip(
            learner.state_dict().values(), learners[0].state_dict().values(), strict=True
        ):
            assert torch.equal(a, b)
    sizes = ("checkpoint_bytes", "weights_bytes")
    assert differences(tmp_path / "0", tmp_path / "1", ignore=sizes) == []
    assert not (tmp_path / "0" / "checkpoints").exists()


# --- the directory --------------------------------------------------------------------------------


def test_a_living_process_keeps_its_run(tmp_path):
    die(tmp_path / "run", dies_at=20)
    lock = tmp_path / "run" / "run.lock"
    with subprocess.Popen(["sleep", "60"]) as other:
        started = Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[19]
        host = os.uname().nodename
        lock.write_text(f"process {other.pid} on {host}, started at tick {started}\n")
        with pytest.raises(UsageError, match=rf"being written by process {other.pid} on"):
            learn(tmp_path / "run", resume=True)
        # The same number, another process: the one that wrote the lock is gone.
        lock.write_text(f"process {other.pid} on {host}, started at tick {int(started) - 1}\n")
        learn(tmp_path / "run", resume=True)
        other.kill()
    assert not lock.exists()


def test_a_process_on_another_host_may_be_alive(tmp_path):
    die(tmp_path / "run", dies_at=20)
    (tmp_path / "run" / "run.lock").write_text("process 1 on elsewhere\n")
    with pytest.raises(UsageError, match=r"process 1 on elsewhere.*delete .*run\.lock"):
        learn(tmp_path / "run", resume=True)


def test_other_data_is_refused(tmp_path):
    die(tmp_path / "run", dies_at=20)
    unseal(tmp_path / "run")  # whose hashes would tell of the edit
    data = tmp_path / "run" / "data.json"
    data.write_text(data.read_text().replace('"fingerprint": "toy"', '"fingerprint": "other"'))
    with pytest.raises(UsageError, match=r"data of .* has changed"):
        learn(tmp_path / "run", resume=True)


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no run"):
        learn(tmp_path, resume=True)


def test_loggers_are_told_what_came_before_and_miss_nothing(tmp_path):
    first, second = Listening(), Listening()
    die(tmp_path / "run", dies_at=26, sinks=[lambda directory: first])
    learn(tmp_path / "run", resume=True, sinks=[lambda directory: second])
    assert second.before == first.events[: len(second.before)]
    assert [*second.before, *second.events] == read_results(tmp_path / "run")


# --- signals --------------------------------------------------------------------------------------


class StoppingError(Exception): ...


@pytest.mark.parametrize("pack", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("moment", [3, 14, 15, 22])
def test_a_signal_ends_the_run_at_a_checkpoint(tmp_path, monkeypatch, capfd, number, moment, pack):
    options = {"strategy": companions, "optimizer": momentum, "pack": pack}
    learn(tmp_path / "whole", **options)

    def stopped(signal_number, frame):
        raise StoppingError

    before = signal.signal(number, stopped)
    original = Mortal._learn

    def signalled(self, batch):
        if self.batches == moment:
            os.kill(os.getpid(), number)
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Mortal, "_learn", signalled)
        with pytest.raises(StoppingError) as caught:
            learn(tmp_path / "run", **options)
        assert signal.getsignal(number) is stopped
    signal.signal(number, before)
    assert any("resume=" in note for note in caught.value.__notes__)
    assert "finishing the step" in capfd.readouterr().err
    again, _ = learn(tmp_path / "run", resume=True, **options)
    # Nothing is learned twice: at most the rest of an epoch's or pack's batches came first.
    assert STEPS - moment - 1 - pack * 2 <= again.batches <= STEPS - moment
    same(tmp_path / "whole", tmp_path / "run")


def test_a_second_signal_does_not_wait(monkeypatch):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            assert interrupts.requested == signal.SIGTERM
            assert seen == []
            now = time.monotonic()
            monkeypatch.setattr("cl_bench.experiment.interrupts.time.monotonic", lambda: now + 10)
            os.kill(os.getpid(), signal.SIGTERM)
            assert seen == [1]
    finally:
        signal.signal(signal.SIGTERM, before)
