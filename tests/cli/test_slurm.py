"""A sweep on a real Slurm of one node, which the tests start; skipped where there is none."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from one_node import OneNode, missing
from sweeps import LONGER, ROOT, TINY, runs_of

from cl_bench.cli.ledger import Ledger
from cl_bench.tracking import read_matrix, read_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

CLUSTER = ("+cluster=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=2")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    pytest.importorskip(
        "submitit", reason="no submitit here (pip install 'cl_bench[slurm]')", exc_type=ImportError
    )
    why = missing()
    if why is not None:
        pytest.skip(why)
    node = OneNode(tmp_path_factory.mktemp("slurm"))
    try:
        why = node.wait()
        if why is not None:
            pytest.skip(why)
        yield node
    finally:
        node.stop()


def start(words, cwd, environment):
    """The command line in a process of its own, what it prints in a file."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with (cwd / "printed.txt").open("a") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "cl_bench", *words],
            cwd=cwd,
            env={**environment, **own},
            stdout=file,
            stderr=file,
        )


def finished(words, cwd, environment):
    status = start(words, cwd, environment).wait(600)
    assert status == 0, (cwd / "printed.txt").read_text()[-3000:]


def matrices(sweep):
    """Bytes of each run's matrix, by the strategy's name."""
    return {p.parent.name: (p / "accuracy_matrix.csv").read_bytes() for p in runs_of(sweep)}


def until(what, seconds=300):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "nothing has happened"
        time.sleep(0.2)


def test_jobs_run_on_slurm_and_come_to_what_they_do_here(slurm, tmp_path):
    sweep = ("-m", "+strategy=finetune,gpm", *TINY)
    finished([*sweep, *CLUSTER, "sweep_dir=there"], tmp_path, slurm.environment)
    logs = sorted((tmp_path / "there/submitit").glob("*/*_log.out"))
    assert len(logs) == 2
    assert all("Starting with JobEnvironment" in path.read_text() for path in logs)
    finished([*sweep, "sweep_dir=here"], tmp_path, slurm.environment)
    assert len(matrices(tmp_path / "there")) == 2
    assert matrices(tmp_path / "there") == matrices(tmp_path / "here")


def test_killed_jobs_go_on_by_the_same_command(slurm, tmp_path):
    words = [*LONGER, *CLUSTER, "seed=0,1", "sweep_dir=killed"]
    sweep = tmp_path / "killed"
    first = start(words, tmp_path, slurm.environment)
    until(lambda: len(list(sweep.rglob("checkpoints/*.pt"))) >= 3)
    begun = [e for e in Ledger(sweep).latest().values() if e["event"] == "started"]
    assert len(begun) == 2
    os.kill(begun[0]["process"], signal.SIGKILL)  # as a node does that is short of memory
    first.kill()  # and whoever waited for them is gone, so that the other job ends too
    first.wait()
    until(lambda: not slurm.ask("squeue", "-h"))
    before = runs_of(sweep)
    assert {read_run(path).status for path in before} == {"unfinished"}
    finished(words, tmp_path, slurm.environment)
    assert runs_of(sweep) == before
    assert "goes on" in "".join(p.read_text() for p in (sweep / "submitit").glob("*/*_log.out"))
    finished([*LONGER, "seed=0,1", "sweep_dir=whole"], tmp_path, slurm.environment)
    again, whole = (
        [(path / "accuracy_matrix.csv").read_bytes() for path in runs_of(tmp_path / name)]
        for name in ("killed", "whole")
    )
    assert again == whole


def test_a_job_of_several_processes(slurm, tmp_path):
    """One Slurm task, which starts two processes that share every batch."""
    words = ["-m", "+strategy=gpm", *TINY, "pack=1"]
    two = ["trainer=ddp", "trainer.devices=2", "hydra.launcher.cpus_per_task=2"]
    finished([*words, *CLUSTER[::2], *two, "sweep_dir=two"], tmp_path, slurm.environment)
    finished([*words, "sweep_dir=one"], tmp_path, slurm.environment)
    (together,), (alone,) = runs_of(tmp_path / "two"), runs_of(tmp_path / "one")
    assert read_run(together).status == "completed"
    np.testing.assert_allclose(read_matrix(together)[1], read_matrix(alone)[1], atol=0.01)


def test_where_there_is_no_slurm_a_line_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("one_node.SBIN", str(tmp_path))
    assert missing().startswith("no Slurm here, slurmctld")
