"""resume= on the command line, after real kills and full disks."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from dying import names, same
from wandb_files import history_rows, read_finished_wandb

from cl_bench.cli.resume import resume
from cl_bench.contracts import UsageError
from cl_bench.experiment.checkpoint import read_checkpoint

pytestmark = pytest.mark.usefixtures("no_pictures")


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
