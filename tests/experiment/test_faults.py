"""Hard knocks: memory, disks, loggers and clocks that fail. What was computed stays."""

import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch
from dying import Mortal, companions, die, learn, momentum, names, noisy, same
from sinks import Listening

from cl_bench.cli.resume import resume
from cl_bench.contracts import UsageError
from cl_bench.experiment.checkpoint import read_checkpoint
from cl_bench.experiment.faults import is_out_of_memory
from cl_bench.strategies.isolation.freeze import Freeze
from cl_bench.tracking import patience, read_results
from cl_bench.tracking.patience import Patient
from cl_bench.tracking.wandb import wandb_sink

pytestmark = pytest.mark.usefixtures("no_pictures")

OPTIONS = {"strategy": companions, "optimizer": momentum, "model": noisy}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What the run leaves if nothing goes wrong."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["cl_bench.experiment.conduct"], "write_figures", lambda _: [])
        learn(directory, **OPTIONS)
    return directory


def goes_on(whole, directory):
    learn(directory, resume=True, **OPTIONS)
    same(whole, directory)


# --- memory ---------------------------------------------------------------------------------------

OUT_OF_MEMORY = {
    "host": MemoryError(),
    "device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "allocator": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ..."),
}


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_out_of_memory_names_the_batch_size_and_keeps_what_there_is(
    tmp_path, whole, monkeypatch, kind
):
    original = Mortal._learn

    def greedy(self, batch):
        if self.batches == 26:
            raise OUT_OF_MEMORY[kind]
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Mortal, "_learn", greedy)
        with pytest.raises(UsageError, match=r"out of memory with batch_size=10.*accumulate") as e:
            learn(tmp_path / "run", **OPTIONS)
    assert any("resume=" in note for note in e.value.__notes__)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["tasks_learned"]) == ("failed", 1)
    goes_on(whole, tmp_path / "run")


def test_other_errors_are_not_taken_for_a_lack_of_memory(tmp_path, monkeypatch):
    def wrong(self, batch):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Mortal, "_learn", wrong)
    with pytest.raises(RuntimeError, match="shapes"):
        learn(tmp_path / "run", **OPTIONS)


def test_an_allocation_that_cannot_be_had_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert is_out_of_memory(caught.value)


# --- disks ----------------------------------------------------------------------------------------

WRITES = ("write", "open", "fsync", "replace", "mkdir")
"""What the operating system does for a run that a full disk may refuse."""


@contextmanager
def full_from(monkeypatch, directory, count, error):
    """From its ``count``-th write in ``directory`` on, the disk takes nothing more."""
    done = itertools.count(1)
    ours = set()

    def refusing(name):
        original = getattr(os, name)

        def call(target, *arguments, **options):
            inside = target in ours or str(target).startswith(str(directory))
            reading = name == "open" and not arguments[0] & (os.O_WRONLY | os.O_RDWR)
            if inside and not reading and next(done) >= count:
                raise OSError(error, os.strerror(error))
            answer = original(target, *arguments, **options)
            if name == "open" and inside:
                ours.add(answer)
            return answer

        return call

    with monkeypatch.context() as patch:
        for name in WRITES:
            patch.setattr(os, name, refusing(name))
        yield
    used.append(next(done))


used: list[int] = []


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses_at_any_write(tmp_path, whole, monkeypatch, error):
    with full_from(monkeypatch, tmp_path / "count", 1 << 30, error):
        learn(tmp_path / "count", **OPTIONS)
    writes = used[-1] - 1
    assert writes > 100
    # Many of the beginning, then some of every kind: a file takes four.
    counts = (
        (1, 2, 3, 5, 8, 12, 20, *range(26, writes, 41)) if error == errno.ENOSPC else (1, 9, 90)
    )
    for count in counts:
        directory = tmp_path / f"at-{count}"
        message = r"cannot write .*(No space left|Read-only)"
        with (
            full_from(monkeypatch, directory, count, error),
            pytest.raises(UsageError, match=message),
        ):
            learn(directory, **OPTIONS)
        for name in names(directory):
            read_checkpoint(directory / "checkpoints" / name)
        if (directory / "results.jsonl").exists() and (directory / "config.yaml").exists():
            goes_on(whole, directory)
        else:  # nothing happened yet, and the directory can be given again
            learn(directory, **OPTIONS)
            same(whole, directory)
        shutil.rmtree(directory)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="needs to mount a disk")
def test_a_read_only_disk(tmp_path, whole):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        die(disk / "run", dies_at=26, **OPTIONS)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for name, again in (("run", True), ("other", False)):
            with pytest.raises(UsageError, match=r"cannot write .*Read-only.*where you may"):
                learn(disk / name, resume=again, **OPTIONS)
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        goes_on(whole, disk / "run")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# --- loggers --------------------------------------------------------------------------------------


class Broken(Listening):
    """Fails, hangs or dawdles in one of its calls."""

    def __init__(self, call, trouble):
        super().__init__()
        setattr(self, call, lambda *_: trouble())


def fails():
    raise ConnectionError("no route to host")


def hangs():
    threading.Event().wait()


@pytest.fixture
def impatient(monkeypatch):
    for name in ("ANSWER_SECONDS", "OPENING_SECONDS", "CLOSING_SECONDS"):
        monkeypatch.setattr(patience, name, 0.2)


@pytest.mark.parametrize("trouble", [fails, hangs])
@pytest.mark.parametrize("call", ["start", "event", "finish", "figures", "close"])
def test_a_logger_in_trouble_costs_the_run_nothing_but_the_logger(
    tmp_path, whole, impatient, call, trouble
):
    said = "no route to host" if trouble is fails else "no answer for 0 s"
    begun = time.monotonic()
    with pytest.warns(UserWarning, match=f"listening failed.*{said}"):
        learn(tmp_path / "run", sinks=[lambda _: Broken(call, trouble)], **OPTIONS)
    assert time.monotonic() - begun < 60
    same(whole, tmp_path / "run")


def test_a_slow_logger_is_waited_for_within_limits(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(patience, "SLOW_SECONDS", 0.01)
    monkeypatch.setattr(patience, "SLOW_TOTAL_SECONDS", 0.1)
    slow = Broken("event", lambda: time.sleep(0.04))
    with pytest.warns(UserWarning, match="slow calls have taken"):
        learn(tmp_path / "run", sinks=[lambda _: slow], **OPTIONS)
    same(whole, tmp_path / "run")


def test_a_logger_in_order_gets_everything_in_order(tmp_path):
    sink = Listening()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        learn(tmp_path / "run", sinks=[lambda _: sink])
    assert sink.events == read_results(tmp_path / "run")


def test_a_service_of_wandb_that_never_answers(tmp_path, whole, impatient, monkeypatch):
    import wandb

    monkeypatch.setattr(wandb, "init", lambda **_: hangs())
    with pytest.warns(UserWarning, match=r"Weights & Biases failed .*no answer"):
        learn(tmp_path / "run", sinks=[lambda d: wandb_sink(d, {})], **OPTIONS)
    same(whole, tmp_path / "run")


def test_a_sinks_own_timeout_is_not_a_hang():
    class Tired(Listening):
        def event(self, event):
            raise TimeoutError("server busy")

    sink = Patient(Tired())
    with pytest.raises(TimeoutError, match="server busy"):
        sink.event({})
    sink.close(failed=True)  # and can still be told to end


# --- clocks ---------------------------------------------------------------------------------------


class Backwards(datetime):
    """Every look at the clock finds it an hour earlier."""

    looks = itertools.count()

    @classmethod
    def now(cls, tz=None):
        return datetime(2030, 1, 1, tzinfo=UTC) - timedelta(hours=next(cls.looks))


def test_a_clock_that_runs_backwards_spoils_nothing(tmp_path, whole, monkeypatch):
    monkeypatch.setattr("cl_bench.tracking.journal.datetime", Backwards)
    looks = itertools.count()
    monkeypatch.setattr(time, "time", lambda: 1e9 - 3600 * next(looks))
    stopped = Exception("pulled the plug")
    original = Mortal._learn

    def dying(self, batch):
        if self.batches == 26:
            raise stopped
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Mortal, "_learn", dying)
        with pytest.raises(Exception, match="pulled"):
            learn(tmp_path / "run", **OPTIONS)
    goes_on(whole, tmp_path / "run")
    events = read_results(tmp_path / "run")
    times = [event["time"] for event in events]
    assert times != sorted(times)
    durations = [e["seconds"] for e in events if "seconds" in e]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert min(durations) >= 0
    assert 0 < summary["wall_seconds"] < 600
    assert 0 < summary["checkpoint_seconds"] < 600


def test_runs_of_the_same_second_do_not_share_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "20261124-220000")
    for _ in range(2):
        learn(None)
    found = sorted(p.name for p in Path("runs/toy/strategy").iterdir())
    assert found == ["20261124-220000-seed0", "20261124-220000-seed0-2"]


# --- found before anything starts, and from anywhere ----------------------------------------------


def test_too_many_blocks_are_refused_before_a_directory_is_taken(tmp_path):
    with pytest.raises(UsageError, match=r"n_blocks=9: the network has 2 blocks"):
        learn(tmp_path / "run", lambda: Freeze(n_blocks=9), scenario="task")
    assert not (tmp_path / "run").exists()


def test_relative_paths_begin_where_the_run_began(tmp_path, monkeypatch, capsys):
    seen = []
    began = tmp_path / "began"
    run = began / "run"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("stream: {data_dir: mnist}\nrun_dir: run\n")
    (run / "command.txt").write_text("python -m cl_bench\n")
    threads = torch.get_num_threads()
    (run / "environment.json").write_text(json.dumps({"directory": str(began), "threads": threads}))

    def started(cfg, command, choices, resume):
        seen.append((os.getcwd(), cfg.run_dir, str(began) in sys.path))

    monkeypatch.setattr("cl_bench.cli.run.run_config", started)
    monkeypatch.chdir(tmp_path)
    resume(["resume=began/run"])
    monkeypatch.chdir(began)
    resume(["resume=run"])
    assert seen[0] == (str(began), str(run), False)
    assert seen[1][:2] == (str(began), "run")
    monkeypatch.chdir(tmp_path)
    began.rename(tmp_path / "moved")
    resume(["resume=moved/run"])
    assert seen[2][:2] == (str(tmp_path), "moved/run")
    assert "is not there: relative paths begin here" in capsys.readouterr().err


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_another_torch_is_installed_in_place_of_the_one_that_is_there(tmp_path):
    root = Path(__file__).parents[2]

    def planned(torch_version):
        done = subprocess.run(
            ["make", "-n", "demo", f"VENV={tmp_path}", f"TORCH={torch_version}"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    first = planned("torch==1")
    assert "torch==1" in first
    (stamp,) = (word for word in first.split() if "/.torch-" in word)
    Path(stamp).touch()
    time.sleep(0.01)
    (tmp_path / ".demo").touch()
    assert "torch==1" not in planned("torch==1")
    again = planned("torch==2")
    assert "torch==2" in again
    assert "--editable" in again
