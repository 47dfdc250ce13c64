"""Workers that are killed or die, and processes whose starter is gone."""

import concurrent.futures.process
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sweeps import LONGER, runs_of, start

from cl_bench.cli.ledger import Ledger
from cl_bench.cli.workers import go_through
from cl_bench.contracts import UsageError
from cl_bench.parallel.processes import ourselves

pytestmark = pytest.mark.usefixtures("no_pictures")


def sleeper():
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])


def test_a_killed_worker_is_one_failed_job_and_the_others_go_on(tmp_path, capfd):
    ledger, rounds = Ledger(tmp_path, 3), []

    def begun(job, number, process):
        ledger.write("started", job, number=number)
        path = tmp_path / "jobs.jsonl"
        ours = f'"job": "{job}", "time"'
        lines = path.read_text().splitlines()
        events = [json.loads(x) | ({"process": process.pid} if ours in x else {}) for x in lines]
        path.write_text("".join(f"{json.dumps(e)}\n" for e in events))

    def launch():
        rounds.append(1)
        if len(rounds) == 1:
            workers = [sleeper(), sleeper()]
            begun("a", 0, workers[0])
            begun("b", 1, workers[1])
            time.sleep(0.4)
            for worker in reversed(workers):  # as joblib does when it finds one dead
                worker.kill()
                worker.wait()
                time.sleep(0.1)
            raise concurrent.futures.process.BrokenProcessPool
        assert [e["job"] for e in ledger.failed()] == ["b"]
        for job in ("a", "c"):
            ledger.write("finished", job, seconds=1.0, whole=True)

    go_through(tmp_path, launch)
    assert len(rounds) == 2
    assert [(e["job"], e["number"]) for e in ledger.failed()] == [("b", 1)]
    assert ledger.unfinished() == []
    assert "job 1 (b) failed: its process was killed" in capfd.readouterr().err


def test_workers_that_die_before_any_job_end_the_sweep(tmp_path):
    def launch():
        raise concurrent.futures.process.BrokenProcessPool

    with pytest.raises(UsageError, match="killed before it began a job"):
        go_through(tmp_path, launch)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_worker_of_joblib_that_is_killed(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    arguments = (*LONGER, "seed=0,1,2", "trainer.max_epochs=30", "sweep_dir=study")
    process = start(*arguments, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", cwd=tmp_path)
    while len(list(tmp_path.rglob("run.lock"))) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(int(next(tmp_path.rglob("run.lock")).read_text().split()[1]), signal.SIGKILL)
    out, _ = process.communicate()
    assert process.returncode == 2, out
    assert "1 of the jobs failed" in out.splitlines()[-1]
    assert out.count("its process was killed") == 1
    ends = [json.loads((run / "summary.json").read_text())["status"] for run in
            runs_of(tmp_path / "study") if (run / "summary.json").exists()]  # fmt: skip
    assert ends == ["completed", "completed"]


def test_a_process_whose_starter_is_gone_ends():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    code = (
        "import time; from cl_bench.parallel.processes import end_with_parent\n"
        f"end_with_parent({ourselves() | {'process': gone.pid}!r}); time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    assert done.returncode == 143
