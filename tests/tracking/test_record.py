"""The record: its files, who may open them, and what happens when a disk fails."""

import csv
import errno
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from recorded import NAMES, THIRD, learn_everything, opened

from cl_bench.contracts import UsageError
from cl_bench.tracking import open_record, read_matrix, read_results, read_run

# --- what is written ------------------------------------------------------------------------------


def test_a_run_leaves_plain_files(tmp_path):
    run = tmp_path / "stream" / "strategy" / "run"
    with opened(
        run,
        config="seed: 0\n",
        command="python -m cl_bench +strategy=gpm +stream=permuted_digits",
        data={"stream": "permuted_digits", "fingerprint": "abc", "scenario": "domain"},
        environment={"processes": 1, "effective_batch": 32},
        facts={"stream": "permuted_digits", "strategy": "gpm", "seed": 0},
    ) as record:
        learn_everything(record)
        summary = record.finish(steps=14)

    assert sorted(p.name for p in run.iterdir()) == [
        "accuracy_matrix.csv",
        "command.txt",
        "config.yaml",
        "data.json",
        "environment.json",
        "layers.csv",
        "results.jsonl",
        "summary.json",
    ]
    assert (run / "config.yaml").read_text() == "seed: 0\n"
    assert (run / "command.txt").read_text() == (
        "python -m cl_bench +strategy=gpm +stream=permuted_digits\n"
    )
    assert json.loads((run / "data.json").read_text())["task_names"] == NAMES
    environment = json.loads((run / "environment.json").read_text())
    assert environment["python"] == sys.version.split()[0]
    assert environment["effective_batch"] == 32
    assert environment["packages"]["cl_bench"] == "0.1.0"
    assert environment["packages"]["numpy"] == np.__version__
    assert (run / "accuracy_matrix.csv").read_text() == (
        "after_task,perm-1,perm-2\n0,0.1,0.2\n1,0.9,0.3\n2,0.3333333333333333,0.8\n"
    )
    assert (run / "layers.csv").read_text() == (
        "task,layer,rank,share\n0,net.0,3,0.5\n1,net.0,4,0.5\n"
    )
    written = json.loads((run / "summary.json").read_text())
    assert written == summary
    assert written["acc"] == pytest.approx((THIRD + 0.8) / 2)
    assert written["bwt"] == pytest.approx(THIRD - 0.9)
    assert written["fwt"] == pytest.approx(0.1)
    assert written["status"] == "completed"
    assert written["steps"] == 14
    assert written["strategy"] == "gpm"
    assert written["task_id_known"] is False
    assert written["tasks_learned"] == 2
    assert written["wall_seconds"] >= 0


def test_events_are_lines_in_the_order_in_which_they_happened(tmp_path):
    with opened(tmp_path / "run") as record:
        learn_everything(record)
    events = read_results(tmp_path / "run")
    assert [e["event"] for e in events] == [
        "status",
        "evaluation",
        *["epoch", "layers", "evaluation"] * 2,
        "status",
    ]
    times = [datetime.fromisoformat(e.pop("time")) for e in events]
    assert times == sorted(times)
    assert times[0].utcoffset().total_seconds() == 0
    assert events[1] == {
        "event": "evaluation",
        "row": 0,
        "task": None,
        "task_name": None,
        "scores": {"perm-1": 0.1, "perm-2": 0.2},
        "task_id_known": False,
        "seconds": 0.5,
    }
    assert events[2] == {
        "event": "epoch",
        "task": 0,
        "epoch": 1,
        "train_loss": 0.25,
        "learning_rate": 0.1,
        "seconds": 1.5,
        "steps": 7,
    }
    assert events[6]["layers"] == {"net.0": {"rank": 4, "share": 0.5}}
    assert events[7]["task_name"] == "perm-2"


def test_the_matrix_is_read_back_bit_for_bit(tmp_path):
    with opened(tmp_path / "run") as record:
        learn_everything(record)
        assert record.matrix.shape == (3, 2)
    names, matrix = read_matrix(tmp_path / "run")
    assert names == NAMES
    np.testing.assert_array_equal(matrix, [[0.1, 0.2], [0.9, 0.3], [THIRD, 0.8]])


def test_an_event_is_on_disk_before_the_call_returns(tmp_path):
    record = opened(tmp_path / "run")
    record.row(row=0, task=None, scores={"perm-1": 0.1}, seconds=0.0)
    assert read_results(tmp_path / "run")[-1]["scores"] == {"perm-1": 0.1}
    assert read_matrix(tmp_path / "run")[1][0, 0] == 0.1
    record.close()


def test_a_killed_process_loses_nothing_that_was_recorded(tmp_path):
    run = tmp_path / "run"
    code = (
        "import os, signal\n"
        "from cl_bench.tracking import open_record\n"
        f"r = open_record({str(run)!r}, ['a', 'b'], task_id_known=True, facts={{'seed': 3}})\n"
        "r.row(row=1, task=0, scores={'a': 0.75}, seconds=0.0)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    read = read_run(run)
    assert read.matrix[1, 0] == 0.75
    assert np.isnan(read.matrix).sum() == 5
    assert read.status == "unfinished"
    assert read.task_id_known is True
    assert read.facts == {"seed": 3}
    with pytest.raises(UsageError, match=r"already holds a run.*resume="):
        opened(run)


def test_what_is_not_finite_is_null_in_json_and_empty_in_csv(tmp_path):
    with opened(tmp_path / "run") as record:
        record.row(row=1, task=0, scores={"perm-1": 0.9, "perm-2": float("nan")}, seconds=0.0)
        record.epoch(
            task=0, epoch=1, train_loss=float("inf"), learning_rate=0.1, seconds=1.0, steps=1
        )
        record.layers(task=0, layers={"a": {"share": np.float64("nan"), "rank": np.int64(2)}})
        record.layers(task=1, layers={"b": {"angle": 0.5}})
    run = tmp_path / "run"
    for name in ("results.jsonl", "summary.json"):
        assert "NaN" not in (run / name).read_text()
        assert "Infinity" not in (run / name).read_text()
    events = read_results(run)
    assert events[1]["scores"] == {"perm-1": 0.9, "perm-2": None}
    assert events[2]["train_loss"] is None
    assert events[3]["layers"] == {"a": {"share": None, "rank": 2}}
    assert json.loads((run / "summary.json").read_text())["bwt"] is None
    assert (run / "accuracy_matrix.csv").read_text().splitlines()[1:] == ["0,,", "1,0.9,"]
    with (run / "layers.csv").open() as file:
        assert list(csv.DictReader(file)) == [
            {"task": "0", "layer": "a", "share": "", "rank": "2", "angle": ""},
            {"task": "1", "layer": "b", "share": "", "rank": "", "angle": "0.5"},
        ]


def test_task_names_may_hold_commas_and_quotes(tmp_path):
    names = ['0, "zero"', "1\n2"]
    with open_record(tmp_path / "run", names, task_id_known=True) as record:
        record.row(row=0, task=None, scores={names[1]: 0.5}, seconds=0.0)
    assert read_matrix(tmp_path / "run")[0] == names


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("boom"), "failed"), (KeyboardInterrupt(), "interrupted")]
)
def test_a_run_that_dies_says_so(tmp_path, error, status):
    def die():
        with opened(tmp_path / "run") as record:
            record.row(row=1, task=0, scores={"perm-1": 0.75}, seconds=0.0)
            raise error

    with pytest.raises(type(error)):
        die()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == status
    assert type(error).__name__ in summary["error"]
    assert summary["acc"] == 0.75
    assert summary["tasks_learned"] == 1
    assert read_run(tmp_path / "run").status == status


def test_git_commit_and_changes_of_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "init", "-q"], check=True)
    (tmp_path / ".gitignore").write_text("runs\n")
    subprocess.run(["git", "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "x"], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)

    def recorded(name):
        with opened(tmp_path / "runs" / name):
            pass
        return json.loads((tmp_path / "runs" / name / "environment.json").read_text())["git"]

    assert recorded("clean") == {"commit": head.stdout.strip(), "dirty": False}
    (tmp_path / "my_strategy.py").write_text("")
    assert recorded("dirty") == {"commit": head.stdout.strip(), "dirty": True}


def test_outside_a_repository_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with opened(tmp_path / "run"):
        pass
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["git"] == {"commit": None, "dirty": None}


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["seed=1", "a,b"])
def test_names_that_hydra_could_not_take_back_are_refused(tmp_path, name):
    with pytest.raises(UsageError, match=rf"run_dir=.*{name}.*another run_dir="):
        opened(tmp_path / name)
    assert not (tmp_path / name).exists()


def test_a_directory_that_holds_a_run_is_left_alone(tmp_path):
    with opened(tmp_path / "run") as record:
        learn_everything(record)
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with pytest.raises(UsageError, match=r"already holds a run: give another run_dir=.*delete"):
        opened(tmp_path / "run")
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


def test_other_files_in_the_directory_do_no_harm(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with opened(tmp_path):
        pass
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write .*file/run \(Not a directory\).*run_dir="):
        opened(tmp_path / "file" / "run")


def _refusal(directory, answers):
    if os.geteuid() == 0:
        os.setuid(65534)  # root may write everywhere
    try:
        opened(directory)
    except UsageError as error:
        answers.put(str(error))
    else:
        answers.put("nothing was refused")


@pytest.mark.parametrize("name", [".", "new"])
def test_a_directory_without_permission_is_named(name):
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as parent:
        Path(parent).chmod(0o555)
        answers = context.Queue()
        child = context.Process(target=_refusal, args=(Path(parent) / name, answers))
        child.start()
        message = answers.get(timeout=60)
        child.join()
    assert message.startswith(f"cannot write {Path(parent) / name}")
    assert "(Permission denied): give run_dir=... where you may write" in message


def _race(directory, start, results):
    start.wait()
    try:
        record = opened(directory)
    except UsageError:
        results.put("lost")
    else:
        results.put("won")
        time.sleep(0.3)
        record.close()


def test_of_processes_that_open_one_directory_exactly_one_wins(tmp_path):
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(4), context.Queue()
    racers = [
        context.Process(target=_race, args=(tmp_path / "run", start, results)) for _ in range(4)
    ]
    for racer in racers:
        racer.start()
    outcomes = sorted(results.get(timeout=60) for _ in racers)
    for racer in racers:
        racer.join()
    assert outcomes == ["lost", "lost", "lost", "won"]


# --- a disk that is full --------------------------------------------------------------------------


class FullDisk:
    """``os.write`` that takes so many bytes and then says what a full disk says."""

    def __init__(self, monkeypatch, room):
        self.room = room
        self.write = os.write
        monkeypatch.setattr(os, "write", self)

    def __call__(self, descriptor, content):
        if self.room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = content[: self.room]
        self.room -= len(taken)
        return self.write(descriptor, taken)


def test_a_full_disk_is_explained_and_takes_nothing_back(tmp_path, monkeypatch):
    run = tmp_path / "run"
    record = opened(run)
    record.row(row=0, task=None, scores={"perm-1": 0.1, "perm-2": 0.2}, seconds=0.0)
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    with monkeypatch.context() as patch:
        FullDisk(patch, room=40)
        with pytest.raises(UsageError, match=r"cannot write .*results\.jsonl \(No space.*run_dir="):
            record.row(row=1, task=0, scores={"perm-1": 0.9}, seconds=0.0)
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before
    # The event fits, the matrix after it does not: the old one stands.
    with monkeypatch.context() as patch:
        FullDisk(patch, room=240)
        with pytest.raises(UsageError, match=r"cannot write .*accuracy_matrix\.csv"):
            record.row(row=1, task=0, scores={"perm-1": 0.9}, seconds=0.0)
    assert (run / "accuracy_matrix.csv").read_bytes() == before["accuracy_matrix.csv"]
    assert not list(run.glob(".*.tmp"))
    record.row(row=2, task=1, scores={"perm-1": 0.8, "perm-2": 0.7}, seconds=0.0)
    record.close()
    assert [e.get("row") for e in read_results(run)] == [None, 0, 1, 2]
    assert read_matrix(run)[1][2].tolist() == [0.8, 0.7]


def test_a_disk_that_is_full_from_the_start_leaves_no_half_run(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        FullDisk(patch, room=100)
        with pytest.raises(UsageError, match="No space left"):
            opened(tmp_path / "run", config="x" * 200)
    with opened(tmp_path / "run"):
        pass


def test_a_full_disk_does_not_hide_what_the_run_died_of(tmp_path, monkeypatch):
    def die():
        with opened(tmp_path / "run"):
            FullDisk(monkeypatch, room=0)
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        die()


def test_a_real_full_file_system(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if mounted.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        record = opened(tmp_path / "run")

        def fill():
            for row in range(100_000):
                record.row(row=row % 3, task=None, scores={"perm-1": 0.5}, seconds=0.0)

        with pytest.raises(UsageError, match="No space left"):
            fill()
        record.close()
        assert len(read_results(tmp_path / "run")) > 10
        assert read_matrix(tmp_path / "run")[1][0, 0] == 0.5
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# --- what a reader meets --------------------------------------------------------------------------


def test_half_a_last_line_is_left_out(tmp_path):
    with opened(tmp_path / "run") as record:
        learn_everything(record)
    path = tmp_path / "run" / "results.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert len(read_results(tmp_path / "run")) == whole.count(b"\n") - 1


def test_a_damaged_line_is_named(tmp_path):
    with opened(tmp_path / "run"):
        pass
    path = tmp_path / "run" / "results.jsonl"
    path.write_text("{half\n" + path.read_text())
    with pytest.raises(UsageError, match=r"results\.jsonl, line 1: not JSON"):
        read_results(tmp_path / "run")


def test_a_damaged_matrix_is_named(tmp_path):
    (tmp_path / "accuracy_matrix.csv").write_text("after_task,a,b\n0,0.5\n")
    with pytest.raises(UsageError, match="not an accuracy matrix of 2 tasks"):
        read_matrix(tmp_path)


def test_a_directory_without_a_run_is_named(tmp_path):
    with pytest.raises(UsageError, match="holds no run"):
        read_run(tmp_path)
    with opened(tmp_path / "run"):
        pass
    with pytest.raises(UsageError, match="has no results yet"):
        read_run(tmp_path / "run")


# --- the live display -----------------------------------------------------------------------------


def test_the_lock_says_who_holds_the_directory(tmp_path):
    record = opened(tmp_path / "run")
    assert (tmp_path / "run" / "run.lock").read_text().startswith(f"process {os.getpid()} on ")
    record.close()
    record.close()
    assert not Path(tmp_path / "run" / "run.lock").exists()
