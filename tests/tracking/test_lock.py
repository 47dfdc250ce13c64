"""One process at a time writes into a run's directory, and it notices when that ends."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dying import files, learn, refuses

from cl_bench.contracts import UsageError
from cl_bench.tracking import open_record, read_results
from cl_bench.tracking.files import LOCK
from cl_bench.tracking.lock import ourselves, take_lock

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def run(killed, tmp_path):
    return Path(shutil.copytree(killed, tmp_path / "run"))


HOLD = """
import sys, time
from pathlib import Path
from cl_bench.tracking.lock import take_lock
lock = take_lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def holding(directory, *before):
    process = subprocess.Popen(
        [*before, sys.executable, "-c", HOLD, str(directory)], stdout=subprocess.PIPE, text=True
    )
    if process.stdout.readline() != "held\n":
        process.wait()
        pytest.skip("no namespaces here")
    return process


@pytest.mark.parametrize("apart", [False, True])
def test_the_kernel_keeps_the_lock(run, apart, monkeypatch):
    """Of a PID namespace too, in which the process has another number."""
    before = ("unshare", "--pid", "--fork", "--uts", "--mount-proc") if apart else ()
    if apart and (os.geteuid() != 0 or not shutil.which("unshare")):
        pytest.skip("needs to make namespaces")
    # Here the number belongs to nobody, and a dead process's children are waited for.
    monkeypatch.setattr("cl_bench.tracking.lock.ORPHAN_SECONDS", 0.2)
    process = holding(run, *before)
    try:
        refuses(run, "is being written by process")
    finally:
        subprocess.run(["pkill", "-KILL", "-P", str(process.pid)], check=False)
        process.kill()
        process.wait()
    take_lock(run).release()
    assert not (run / LOCK).exists()


def test_a_lock_that_is_deleted_ends_the_writing(tmp_path):
    record = open_record(tmp_path / "run", ["a"], task_id_known=False)
    (tmp_path / "run" / LOCK).unlink()
    other = take_lock(tmp_path / "run")
    before = files(tmp_path / "run")
    for write in (
        lambda: record.row(row=0, task=None, scores={"a": 0.5}, seconds=0.0),
        lambda: record.status("more"),
        record.finish,
        record.require_lock,
    ):
        with pytest.raises(UsageError, match=r"run\.lock was deleted or replaced"):
            write()
    record.close()
    assert files(tmp_path / "run") == before
    other.require()
    other.release()


def test_a_run_whose_lock_is_deleted_stops(tmp_path):
    class Thief:
        name = "thief"

        def event(self, event):
            if event["event"] == "epoch":
                (tmp_path / "run" / LOCK).unlink(missing_ok=True)

        def __getattr__(self, name):
            return lambda *arguments: None

    with pytest.raises(UsageError, match=r"run\.lock was deleted or replaced"):
        learn(tmp_path / "run", sinks=[lambda directory: Thief()])
    assert read_results(tmp_path / "run")[-1]["event"] == "epoch"
    learn(tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("age", "gone"),
    [(0, False), (600, True)],
)
def test_another_machine_lives_as_long_as_its_heart_beats(tmp_path, age, gone):
    lock = tmp_path / LOCK
    lock.write_text("process 7 on elsewhere, started at tick 5, boot 0a-1b\n")
    then = time.time() - age
    os.utime(lock, (then, then))
    if gone:
        take_lock(tmp_path).release()
    else:
        with pytest.raises(UsageError, match="is being written by process 7 on elsewhere"):
            take_lock(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_the_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr("cl_bench.tracking.lock.BEAT_SECONDS", 0.01)
    lock = take_lock(tmp_path)
    os.utime(lock.path, (0, 0))
    deadline = time.monotonic() + 5
    while lock.path.stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert time.time() - lock.path.stat().st_mtime < 60
    lock.release()


def test_a_forked_child_does_not_hold_the_lock(tmp_path):
    lock = take_lock(tmp_path)
    there, here = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(here, b".")
        time.sleep(30)
        os._exit(0)
    try:
        os.read(there, 1)
        lock.let_go()  # as the kernel does when the parent is killed
        (tmp_path / LOCK).write_text(ourselves())
        take_lock(tmp_path).release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
