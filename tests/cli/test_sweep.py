"""Sweeps as their users meet them: skipped, resumed, reported, the same table after a kill."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from sweeps import LONGER, TINY, runs_of, start

from cl_bench.cli.ledger import Ledger
from cl_bench.cli.main import main
from cl_bench.cli.sweep import identity, place
from cl_bench.errors import UsageError
from cl_bench.report.compare import to_csv
from cl_bench.report.quantities import COSTS
from cl_bench.report.study import read_study
from runs import differences

ARGUMENTS = ("-m", "+strategy=finetune,gpm", *TINY, "seed=0,1", "sweep_dir=study")


def table(directory):
    """The table of a sweep without what no two runs measure alike."""
    lines = [line.split(",") for line in to_csv(read_study([directory])).splitlines()]
    measured = {"wall_seconds", "peak_memory_bytes", "inference_overhead"} & set(COSTS)
    kept = [i for i, name in enumerate(lines[0]) if name not in measured]
    return [[line[i] for i in kept] for line in lines]


# --- where a sweep and its jobs are ---------------------------------------------------------------


def test_a_sweeps_name_follows_from_what_is_run_and_not_from_how():
    words = ["+strategy=gpm,er", "+stream=permuted_digits", "seed=0,1"]
    name = identity(words)
    assert name.startswith("permuted_digits-")
    assert identity([words[2], *words[:2]]) == name
    assert identity([*words, "hydra/launcher=joblib", "hydra.launcher.n_jobs=4"]) == name
    assert identity([*words[:2], "seed=0,2"]) != name
    assert not set("=,/ ") & set(identity(["+stream=biography/tiny,b c", "a={x: 1}"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep_dir=a", "+strategy=gpm"], "sweep_dir=a: that is for several runs"),
        (["-m", "sweep_dir=a", "sweep_dir=b"], "sweep_dir stands there 2 times"),
        (["-m", "sweep_dir=a=b"], "sweep_dir=a=b: a name with '='"),
        (["-m", "hydra.sweep.dir=x"], "hydra.sweep.dir=x: name the sweep's directory with sweep_"),
    ],
)
def test_a_directory_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(UsageError) as refused:
        place(arguments)
    assert str(refused.value).startswith(message)


# --- the ledger -----------------------------------------------------------------------------------


def test_jobs_done_running_and_failed_and_the_time_left(tmp_path):
    ledger = Ledger(tmp_path, total=6)
    ledger.write("started", "a")
    assert ledger.standing() == "sweep:  0 of 6 jobs done  1 running  0 failed"
    ledger.write("finished", "a", seconds=10.0, whole=True)
    ledger.write("started", "b")
    ledger.write("failed", "b", number=1, error="no")
    ledger.write("skipped", "c")
    assert ledger.standing() == "sweep:  2 of 6 jobs done  0 running  1 failed  0:30 left"
    assert [e["number"] for e in ledger.failed()] == [1]
    ledger.begin()
    assert ledger.standing() == "sweep:  2 of 6 jobs done  0 running  0 failed  0:40 left"


def test_a_job_whose_process_is_gone_does_not_run(tmp_path):
    ledger = Ledger(tmp_path, total=2)
    ledger.write("started", "a")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    path = tmp_path / "jobs.jsonl"
    path.write_text(path.read_text().replace(f'"process": {os.getpid()}', f'"process": {gone.pid}'))
    assert "0 running" in ledger.standing()
    path.write_text(path.read_text() + '{"event": "fini')  # as a kill leaves it
    assert "0 of 2 jobs done" in ledger.standing()


def test_what_is_damaged_in_the_ledger_costs_that_line_alone(tmp_path):
    ledger = Ledger(tmp_path, total=2)
    path = tmp_path / "jobs.jsonl"
    path.write_bytes(b'5\n[]\n{"a": 1}\n\xff\xfe\n\0\0\n{"event": "sta')
    ledger.write("finished", "a", seconds=1.0, whole=True)
    assert ledger.standing().startswith("sweep:  1 of 2 jobs done")
    assert path.read_bytes().count(b"\n") == 7


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_ledger_on_a_full_disk_is_one_line(tmp_path):
    (tmp_path / "jobs.jsonl").symlink_to("/dev/full")
    with pytest.raises(UsageError, match=r"jobs\.jsonl \(No space left.*free some space"):
        Ledger(tmp_path).write("started", "a")


# --- sweeps ---------------------------------------------------------------------------------------


def test_the_same_command_again_skips_what_is_finished(cli, tmp_path):
    status, out, _ = cli(*ARGUMENTS)
    assert status == 0
    assert "sweep:  4 of 4 jobs done  0 running  0 failed" in out
    assert out.splitlines()[-1].endswith("python -m cl_bench report study")
    found = runs_of("study")
    assert [p.relative_to("study").parts[:2] for p in found] == [
        ("permuted_digits", "finetune"),
        ("permuted_digits", "finetune"),
        ("permuted_digits", "gpm"),
        ("permuted_digits", "gpm"),
    ]
    assert {OmegaConf.load(p / "config.yaml").logger.group for p in found} == {"study"}
    before = {p: (p / "results.jsonl").read_bytes() for p in found}
    first = table("study")

    status, out, _ = cli(*ARGUMENTS, "hydra.launcher={}")
    assert status == 0
    assert out.count("was finished before") == 4
    assert {p: (p / "results.jsonl").read_bytes() for p in runs_of("study")} == before
    assert table("study") == first

    # More seeds in the same directory: only what is new is run.
    status, out, _ = cli(*ARGUMENTS[:-2], "seed=1,2", "sweep_dir=study")
    assert (status, out.count("was finished before"), len(runs_of("study"))) == (0, 2, 6)


def test_jobs_that_are_damaged_fail_and_stop_no_other(cli):
    cli(*ARGUMENTS)
    cut, lost, changed, _ = map(Path, runs_of("study"))
    summary = (cut / "summary.json").read_bytes()
    (cut / "summary.json").write_bytes(summary[:50])
    results = (lost / "results.jsonl").read_bytes().splitlines(keepends=True)
    (lost / "results.jsonl").write_bytes(b"".join(results[:-1]))  # killed before its end
    shutil.rmtree(lost / "checkpoints")
    results = (changed / "results.jsonl").read_bytes()
    (changed / "results.jsonl").write_bytes(results.replace(b"epoch", b"ep\xffch", 1))
    status, out, err = cli(*ARGUMENTS)
    assert status == 2
    assert "1 of 4 jobs done" in out
    assert "Traceback" not in err
    said = " ".join(err.split())
    assert f"{cut}/summary.json is not as the run wrote it" in said
    assert f"run the job again: python -m cl_bench resume={cut} from=start" in said
    assert "there is no checkpoint in" in said
    assert f"begin the run again: resume={lost} from=start" in said
    assert re.search(rf"{changed}/results\.jsonl, line \d: not UTF-8", said)
    assert "3 of the jobs failed: 0, 1, 2" in said
    assert (lost / "weights").is_dir()
    assert cli(f"resume={cut}", "from=start")[0] == 0
    assert "2 of 4 jobs done" in cli(*ARGUMENTS)[1]


def test_a_job_that_fails_however_it_does_stops_no_other(cli, tmp_path, monkeypatch):
    (tmp_path / "conf/strategy").mkdir(parents=True)
    (tmp_path / "breaking.py").write_text(
        "from cl_bench.contracts import Strategy\n"
        "class Breaking(Strategy):\n"
        "    def setup(self, learner, task):\n"
        "        raise RuntimeError('a mistake')\n"
    )
    (tmp_path / "conf/strategy/breaking.yaml").write_text("_target_: breaking.Breaking\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = ("-m", "+strategy=breaking,finetune", *TINY, "seed=0,-1", "sweep_dir=study")
    status, out, err = cli("--config-dir", "conf", *arguments)
    assert status == 2
    assert "sweep:  1 of 4 jobs done  0 running  3 failed" in out
    assert "job 0 (+strategy=breaking" in err
    assert "failed: RuntimeError: a mistake" in err
    assert "seed=-1: must not be negative" in err
    assert err.splitlines()[-1] == "error: 3 of the jobs failed: 0, 1, 3"
    study = read_study(["study"])
    assert [row.label for row in study.rows()] == ["finetune"]
    assert len(study.left_out) == 0 or "failed" in study.left_out[0]


def test_other_settings_in_the_same_directory_are_refused(cli):
    one = ("-m", "+strategy=finetune", *TINY, "seed=0", "sweep_dir=study")
    assert cli(*one)[0] == 0
    (run,) = runs_of("study")
    config = OmegaConf.load(run / "config.yaml")
    config.batch_size = 17
    OmegaConf.save(config, run / "config.yaml")
    status, _, err = cli(*one)
    assert status == 2
    assert "was run with batch_size=17, which is now 10: give another sweep_dir=" in err


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The sweep that nobody interrupted, one job after another."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HYDRA_FULL_ERROR", "0")
        patch.setattr(sys, "argv", ["cl_bench", *LONGER, "seed=0,1", "sweep_dir=study"])
        assert main() == 0
    return folder / "study"


@pytest.mark.timeout(300)
def test_the_cores_of_a_machine(cli, whole):
    """Jobs in processes of their own: failures come back, output goes to files."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    launcher = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    status, _, err = cli(*LONGER, "seed=0,1,-1", "sweep_dir=study", *launcher)
    assert status == 2
    assert "error: 1 of the jobs failed: 2" in err
    assert Ledger(Path("study"), 3).standing() == "sweep:  2 of 3 jobs done  0 running  1 failed"
    logs = sorted(Path("study/logs").iterdir())
    assert len(logs) == 3
    assert sum("mean over seen" in log.read_text() for log in logs) == 2
    assert table("study") == table(whole)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "launcher",
    [
        ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
        pytest.param((), marks=pytest.mark.slow),
    ],
)
def test_a_sweep_killed_at_a_random_moment_ends_with_the_same_table(cli, tmp_path, whole, launcher):
    if launcher:
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    arguments = (*LONGER, "seed=0,1", "sweep_dir=study")
    kill_at_random(start(*arguments, *launcher, cwd=tmp_path), tmp_path / "study")
    status, out, err = cli(*arguments)
    assert (status, err) == (0, ""), out
    assert table("study") == table(whole)
    for a, b in zip(runs_of("study"), runs_of(whole), strict=True):
        # The other launcher stands among the choices.
        found = [d for d in differences(a, b) if not d.startswith("choices.json")]
        assert found == []


def kill_at_random(process, directory):
    """With SIGKILL, some time after its first job has begun; its workers must end by themselves."""
    deadline = time.monotonic() + 120
    while not list(directory.rglob("results.jsonl")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(random.uniform(0, 2.0))
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 20
    while any(alive(lock) for lock in directory.rglob("run.lock")):
        assert time.monotonic() < deadline, "a worker goes on without its sweep"
        time.sleep(0.05)


def alive(lock):
    try:
        os.kill(int(lock.read_text().split()[1]), 0)
    except (ProcessLookupError, FileNotFoundError, IndexError):
        return False
    return True


@pytest.mark.timeout(200)
def test_ctrl_c_says_how_to_go_on(tmp_path):
    process = start(
        "-m", "+strategy=gpm", *TINY, "trainer.max_epochs=100000", "seed=0,1", cwd=tmp_path
    )
    deadline = time.monotonic() + 100
    while not list(tmp_path.rglob("results.jsonl")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    last = out.splitlines()[-1]
    assert last.startswith("go on with the sweep: python -m cl_bench -m +strategy=gpm")
    assert "hydra.sweep.dir" not in last
    events = [json.loads(line) for line in next(tmp_path.rglob("jobs.jsonl")).open()]
    assert [e["event"] for e in events] == ["started", "interrupted"]
