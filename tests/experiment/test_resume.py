"""Checkpoints, and runs that go on from them as if nothing had happened."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from dying import Killed, Mortal, companions, die, learn, momentum, names, noisy, same, sgd
from sinks import Listening
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import MultiStepLR
from toys import make_stream
from wandb_files import history_rows, read_finished_wandb

from cl_bench.cli.resume import resume
from cl_bench.contracts import EpochDecision, Strategy, UsageError
from cl_bench.experiment import (
    CheckpointSettings,
    Plateau,
    TrainLoader,
)
from cl_bench.experiment.checkpoint import (
    FORMAT,
    Checkpoints,
    DamagedError,
    read_checkpoint,
    write_checkpoint,
)
from cl_bench.experiment.interrupts import Interrupts
from cl_bench.experiment.snapshot import copied, plain, random_states, set_random_states, sharing
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


# --- which checkpoints there are ------------------------------------------------------------------


def test_the_newest_checkpoints_stay(tmp_path):
    learn(tmp_path / "two")
    assert names(tmp_path / "two") == [
        "task0002-step000000012.pt",
        "task0003-step000000000.pt",
    ]
    learn(tmp_path / "all", keep=100)
    # 15 steps a task; what is due at the end of an epoch waits for the next one to begin.
    assert names(tmp_path / "all") == [
        f"task{task:04}-step{step:09}.pt"
        for task, steps in ((0, (0, 4, 8, 12)), (1, (0, 4, 8, 12)), (2, (0, 4, 8, 12)), (3, (0,)))
        for step in steps
    ]
    learn(tmp_path / "ends", keep=100, every=None)
    assert names(tmp_path / "ends") == [f"task{t:04}-step000000000.pt" for t in range(4)]
    summary = json.loads((tmp_path / "all" / "summary.json").read_text())
    # In plain SGD all that a checkpoint holds are weights, now and before, and the observer's.
    sizes = [p.stat().st_size for p in (tmp_path / "all" / "checkpoints").iterdir()]
    assert max(sizes) / 4 < summary["checkpoint_bytes"] < max(sizes)
    assert 0 < summary["checkpoint_seconds"] < summary["wall_seconds"]


def test_a_kill_between_writing_and_letting_go_leaves_none_too_many(tmp_path, monkeypatch):
    learn(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_let_go", lambda self: None)
        die(tmp_path / "run", dies_at=31)
    assert len(names(tmp_path / "run")) > 2
    learn(tmp_path / "run", resume=True)
    same(tmp_path / "whole", tmp_path / "run")


def test_what_is_due_at_the_end_of_an_epoch_waits_for_the_next(tmp_path):
    learn(tmp_path / "run", every=5, keep=100)
    assert [n for n in names(tmp_path / "run") if n.startswith("task0001")] == [
        f"task0001-step{step:09}.pt" for step in (0, 5, 10)
    ]
    state = read_checkpoint(tmp_path / "run" / "checkpoints" / "task0001-step000000010.pt")
    assert (state["inside"]["epoch"], state["inside"]["position"]) == (2, 0)
    events = [e["event"] for e in read_results(tmp_path / "run")]
    recorded = (tmp_path / "run" / "results.jsonl").read_bytes()[: int(state["position"])]
    assert recorded.count(b'"event": "epoch"') == 5
    assert events.count("epoch") == 9


def test_a_checkpoint_is_plain_and_loads_anywhere(tmp_path):
    learner, _ = learn(tmp_path / "run", companions, optimizer=adam, keep=100)
    for path in Checkpoints(tmp_path / "run", CheckpointSettings()).paths():
        state = torch.load(path, weights_only=True)
        assert state["format"] == FORMAT
    for name, value in learner.state_dict().items():
        assert torch.equal(state["start"]["weights"][name], value)
    assert state["task"] == 3
    assert state["inside"] is None


def test_what_a_task_does_not_change_is_stored_once(tmp_path):
    learn(tmp_path / "run", gpm, keep=100)
    state = torch.load(
        tmp_path / "run" / "checkpoints" / "task0002-step000000004.pt", weights_only=True
    )
    start, inside = (state[k]["strategy"]["memory"] for k in ("start", "inside"))
    assert start
    for name, basis in start.items():
        assert basis.untyped_storage().data_ptr() == inside[name].untyped_storage().data_ptr()
    before, now = (state[k]["weights"]["backbone.fc1.weight"] for k in ("start", "inside"))
    assert not torch.equal(before, now)


def test_settings_are_checked():
    with pytest.raises(UsageError, match=r"checkpoint\.every_steps=0"):
        CheckpointSettings(every_steps=0)
    with pytest.raises(UsageError, match=r"checkpoint\.keep=0"):
        CheckpointSettings(keep=0)


# --- damaged and missing checkpoints --------------------------------------------------------------


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def replace(path):
    torch.save({"format": FORMAT}, path)


DAMAGE = {
    flip: "contents have changed",
    cut: "ends too early",
    halve: "ends too early",
    empty: "only 0 bytes",
    replace: "ends too early",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_of_damaged_checkpoints_the_one_before_is_used(tmp_path, capsys, damage):
    options = {"strategy": er, "optimizer": momentum}
    learn(tmp_path / "whole", **options)
    die(tmp_path / "run", dies_at=26, **options)
    before, newest = names(tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / newest
    damage(path)
    with pytest.raises(DamagedError, match=DAMAGE[damage]):
        read_checkpoint(path)
    learn(tmp_path / "run", resume=True, **options)
    said = capsys.readouterr().out
    assert f"{newest} is damaged" in said
    assert f"resumed from {before}" in said
    same(tmp_path / "whole", tmp_path / "run")


def test_a_checkpoint_that_the_record_lags_behind_is_passed_over(tmp_path, capsys):
    learn(tmp_path / "whole", er)
    die(tmp_path / "run", er, dies_at=31)
    older, newest = (tmp_path / "run" / "checkpoints" / name for name in names(tmp_path / "run"))
    results = tmp_path / "run" / "results.jsonl"
    results.write_bytes(results.read_bytes()[: read_checkpoint(older)["position"]])
    learn(tmp_path / "run", er, resume=True)
    assert f"{newest} cannot be used ({results} is shorter" in capsys.readouterr().out
    same(tmp_path / "whole", tmp_path / "run")


def test_another_format_is_not_read(tmp_path):
    with (tmp_path / "x.pt").open("w+b") as file:
        write_checkpoint(file, {"format": 99})
    with pytest.raises(UsageError, match=r"has format 99, and this version .* reads 2"):
        read_checkpoint(tmp_path / "x.pt")


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    learn(tmp_path / "whole", gpm)
    with monkeypatch.context() as patch:
        original = torch.save

        def full(state, file):
            if state["task"] == 1 and state["step"] == 8:
                file.write(b"PK")
                file.file = FullFile()
            original(state, file)

        patch.setattr(torch, "save", full)
        with pytest.raises(UsageError, match=r"cannot write .*task0001.*No space") as caught:
            learn(tmp_path / "run", gpm)
    assert any("resume=" in note for note in caught.value.__notes__)
    assert names(tmp_path / "run") == ["task0001-step000000000.pt", "task0001-step000000004.pt"]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    learn(tmp_path / "run", gpm, resume=True)
    same(tmp_path / "whole", tmp_path / "run")


class FullFile:
    def write(self, content):
        raise OSError(28, "No space left on device")


def test_state_that_could_not_be_loaded_is_refused_when_it_is_saved(tmp_path):
    class Secretive(Strategy):
        def state_dict(self):
            return {"memory": [torch.zeros(1), {"what": object()}]}

    with pytest.raises(UsageError, match=r"strategy\.memory\[1\]\.what is a object"):
        learn(tmp_path / "run", Secretive)


# --- the pieces -----------------------------------------------------------------------------------


def test_random_states_come_back():
    import random

    import numpy as np

    def draw():
        return torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist(), random.gauss()

    random.gauss()
    np.random.randn()
    state = plain(random_states(), "")
    first = draw()
    set_random_states(state)
    assert draw() == first


def test_copies_keep_strides():
    wide = torch.arange(12.0).reshape(3, 4)
    made = copied({"t": wide.t(), "slice": wide[:, 1:3], "deep": [{"x": wide[0].expand(2, 4)}]})
    assert made["t"].stride() == (1, 4)
    assert made["slice"].stride() == (4, 1)
    assert torch.equal(made["slice"], wide[:, 1:3])
    wide += 1
    assert made["t"][0, 0] == 0
    assert made["deep"][0]["x"][1, 3] == 3


def test_tensors_are_shared_only_if_every_bit_is_the_same():
    zero, minus = torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0])
    new = {"a": zero.clone(), "b": minus, "c": [zero.double()], "d": zero}
    old = {"a": zero, "b": zero, "c": [zero], "e": zero}
    shared = sharing(old, new)
    assert shared["a"] is new["a"]
    assert shared["b"] is zero
    assert shared["c"][0] is zero
    assert shared["e"] is zero


def test_a_loader_begins_where_it_is_told():
    task = make_stream(n=44)[1]

    def batches(loader):
        return [batch["x"] for batch in loader]

    whole = TrainLoader(task.train, 10, 0, 1, pack=2)
    epochs = [batches(whole) for _ in range(3)]
    later = TrainLoader(task.train, 10, 0, 1, pack=2)
    later.resume_at(1, 1)
    assert len(later) == len(whole) == 3
    for expected in (epochs[1][1:], epochs[2]):
        for a, b in zip(batches(later), expected, strict=True):
            assert torch.equal(a, b)


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


# --- the command line, and real kills -------------------------------------------------------------


def cli(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "cl_bench", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        **options,
    )


def test_resume_stands_alone(tmp_path):
    with pytest.raises(
        UsageError, match=r"resume=\.\.\. stands alone, or with from=start, .* seed=3"
    ):
        resume([f"resume={tmp_path}", "seed=3"])
    for words in (["resume"], ["resume="], ["resume", "from=start"]):
        with pytest.raises(UsageError, match="resume=: names no run; give its directory"):
            resume(words)
    with pytest.raises(UsageError, match=r"resume=\.\.\. stands there twice"):
        resume(["resume=a", "resume=b"])


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(UsageError, match=r"that directory holds no run \(config\.yaml is missing"):
        resume([f"resume={tmp_path}"])


SMALL = (
    "+strategy=gpm",
    "+also=er",
    "+stream=permuted_digits",
    "stream.num_tasks=2",
    "trainer.max_epochs=2",
    "trainer.accelerator=cpu",
    "optimizer.momentum=0.9",
    "checkpoint.every_steps=50",
)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cli") / "whole"
    done = cli(*SMALL, f"run_dir={directory}")
    assert done.returncode == 0, done.stderr
    return directory


def timeless_row(row):
    times = ("_runtime", "_timestamp", "_wandb", "train/seconds", "accuracy_matrix")
    return {k: v for k, v in row.items() if not k.startswith((*times, "figures"))}


def kill_when(directory, seen, *arguments):
    """Start a run, and kill -9 it as soon as ``seen()``."""
    with subprocess.Popen(
        [sys.executable, "-m", "cl_bench", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        while process.poll() is None and not seen():
            time.sleep(0.0005)
        process.kill()
    return process.returncode


def last_segment(directory):
    """The W&B file of the last process that wrote to the run."""
    segment = sorted((directory / "wandb").glob("offline-run-*"))[-1]
    return segment / f"run-{segment.name.rsplit('-', 1)[1]}.wandb"


@pytest.mark.parametrize("checkpoint", ["task0000-step000000000", "task0001-step000000128"])
def test_kill_9_and_resume(tmp_path, whole_run, checkpoint):
    directory = tmp_path / "run"
    awaited = directory / "checkpoints" / f"{checkpoint}.pt"
    assert kill_when(directory, awaited.exists, *SMALL, f"run_dir={directory}") == -9
    done = cli(f"resume={directory}")
    assert done.returncode == 0, done.stderr
    assert "resumed from task" in done.stdout
    same(whole_run, directory)
    segments = list((directory / "wandb").glob("offline-run-*"))
    identifier = (directory / "wandb_id.txt").read_text().strip()
    assert len(segments) == 2
    assert all(s.name.endswith(identifier) for s in segments)
    # Whatever the killed process had not written yet: the last segment has every point, once.
    complete, expected = (
        history_rows(read_finished_wandb(last_segment(d))) for d in (directory, whole_run)
    )
    assert [timeless_row(row) for row in complete] == [timeless_row(row) for row in expected]
    assert len(complete) > 6


def test_killed_before_anything_was_kept(tmp_path, whole_run):
    directory = tmp_path / "run"
    results = directory / "config.yaml"
    assert kill_when(directory, results.exists, *SMALL, f"run_dir={directory}") == -9
    done = cli(f"resume={directory}")
    assert done.returncode == 0, done.stderr
    assert "begins again from its beginning" in done.stdout
    same(whole_run, directory)


def test_a_finished_run_is_left_alone(whole_run, capsys):
    before = {p: p.read_bytes() for p in whole_run.rglob("*") if p.is_file()}
    resume([f"resume={whole_run}"])
    assert "is finished: there is nothing to resume" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in whole_run.rglob("*") if p.is_file()} == before


def test_sigterm_says_how_to_go_on(tmp_path, whole_run):
    directory = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-m", "cl_bench", *SMALL, f"run_dir={directory}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        awaited = directory / "checkpoints" / "task0000-step000000064.pt"
        while process.poll() is None and not awaited.exists():
            time.sleep(0.0005)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate()
    assert process.returncode == 143, said
    assert f"resume={directory}" in said
    assert "Traceback" not in said
    assert cli(f"resume={directory}").returncode == 0
    same(whole_run, directory)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="needs to mount a disk")
def test_a_really_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(disk)], check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        run = disk / "run"
        done = cli(*SMALL, f"run_dir={run}", "logger.mode=disabled")
        assert done.returncode == 2
        assert "No space left on device" in done.stderr
        assert f"resume={run}" in done.stderr
        assert "Traceback" not in done.stderr
        for name in names(run):
            read_checkpoint(run / "checkpoints" / name)
        assert names(run)
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        assert cli(f"resume={run}").returncode == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)
