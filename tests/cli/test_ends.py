"""Ends of processes: signals, closed pipes, killed workers; beginnings: data, names, threads."""

import concurrent.futures.process
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from dying import learn, momentum, same
from rich.console import Console
from sweeps import LONGER, TINY, runs_of, start
from toys import make_stream

from cl_bench.cli import threads
from cl_bench.cli.ledger import Ledger
from cl_bench.cli.output import Outlet
from cl_bench.cli.sweep import SweepJob
from cl_bench.cli.workers import go_through
from cl_bench.contracts import UsageError
from cl_bench.data import MemoryData
from cl_bench.experiment.checks import check_tasks
from cl_bench.learners import BaseLearner
from cl_bench.parallel import launch
from cl_bench.parallel.processes import ourselves
from cl_bench.report import print_run, write_figures
from cl_bench.tracking import ProgressDisplay, open_record, read_results
from cl_bench.tracking.reading import is_finished

pytestmark = pytest.mark.usefixtures("no_pictures")


# --- signals --------------------------------------------------------------------------------------


class StoppingError(Exception): ...


@pytest.fixture
def stopped():
    """What the signals raise once the run passes them on."""

    def stop(number, frame):
        raise StoppingError

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["cl_bench.experiment.conduct"], "write_figures", lambda _: [])
        learn(directory, optimizer=momentum)
    return directory


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("moment", [1, 2, 3, 5, 12])
def test_a_signal_while_tasks_are_scored(tmp_path, whole, monkeypatch, stopped, number, moment):
    """Three tasks, one batch each, are scored four times: first, middle and last ones."""
    original, seen = BaseLearner.test_step, []

    def signalled(self, *arguments, **options):
        seen.append(1)
        if len(seen) == moment:
            os.kill(os.getpid(), number)
        return original(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(BaseLearner, "test_step", signalled)
        with pytest.raises(StoppingError) as caught:
            learn(tmp_path / "run", optimizer=momentum)
    assert any("resume=" in note for note in caught.value.__notes__)
    rows = [e for e in read_results(tmp_path / "run") if e["event"] == "evaluation"]
    assert len(rows) == -(-moment // 3)  # what was being scored is scored
    again, _ = learn(tmp_path / "run", resume=True, optimizer=momentum)
    assert again.batches == 15 * (4 - len(rows))  # and nothing is learned twice
    same(whole, tmp_path / "run")


def test_sigterm_before_the_first_step_of_a_task(tmp_path, whole, monkeypatch, stopped):
    original = ProgressDisplay.task

    def signalled(self, index, *arguments, **options):
        if index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, index, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ProgressDisplay, "task", signalled)
        with pytest.raises(StoppingError):
            learn(tmp_path / "run", optimizer=momentum)
    learn(tmp_path / "run", resume=True, optimizer=momentum)
    same(whole, tmp_path / "run")


def test_sigterm_while_scoring_without_checkpoints_stops_at_once(tmp_path, monkeypatch, stopped):
    original, seen = BaseLearner.test_step, []

    def signalled(self, *arguments, **options):
        seen.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments, **options)

    monkeypatch.setattr(BaseLearner, "test_step", signalled)
    with pytest.raises(StoppingError):
        learn(tmp_path / "run", enabled=False)
    assert len(seen) == 1


# --- output that nobody reads ---------------------------------------------------------------------


@pytest.fixture
def hung_up():
    heard = []
    before = signal.signal(signal.SIGHUP, lambda number, frame: heard.append(number))
    yield heard
    signal.signal(signal.SIGHUP, before)


def test_a_closed_pipe_asks_for_an_end_once(hung_up):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        outlet = Outlet(stream)
        for _ in range(3):
            assert outlet.write("a line\n") == 7
            outlet.flush()
        print("another", file=outlet, flush=True)
    assert hung_up == [signal.SIGHUP]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_log_costs_the_log_alone(hung_up, capfd):
    with open("/dev/full", "w") as stream:
        outlet = Outlet(stream)
        for _ in range(3):
            outlet.write("a line\n")
            outlet.flush()
    assert hung_up == []
    assert capfd.readouterr().err.count("No space left on device") == 1


def test_letters_that_the_terminal_does_not_know(tmp_path):
    with open(tmp_path / "log", "w", encoding="ascii") as stream:
        Outlet(stream).write("1 · ü\n")
    assert (tmp_path / "log").read_text() == "1 ? ?\n"


@pytest.fixture
def hears_hangup():
    """As outside of nohup, which has SIGHUP ignored in all that it starts."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.timeout(200)
def test_a_run_whose_reader_leaves(tmp_path, hears_hangup):
    longer = ("stream.num_tasks=10", "trainer.max_epochs=20", "run_dir=out")
    process = subprocess.Popen(
        [sys.executable, "-m", "cl_bench", "+strategy=finetune", *TINY, *longer],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 129
    assert "Traceback" not in said
    assert said.splitlines()[-1].endswith("go on with: python -m cl_bench resume=out")
    last = read_results(tmp_path / "out")[-1]
    assert last["status"] == "interrupted"
    assert "what reads the output has ended" in last["error"]
    assert list((tmp_path / "out/checkpoints").iterdir())


# --- workers --------------------------------------------------------------------------------------


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


# --- when there is nothing left to end ------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("late", ["pictures", "after"])
def test_a_signal_when_the_run_is_completed(cli, monkeypatch, number, late):
    def signalled(*arguments, **options):
        os.kill(os.getpid(), number)
        return []

    if late == "pictures":
        monkeypatch.setattr(sys.modules["cl_bench.experiment.conduct"], "write_figures", signalled)
    else:
        monkeypatch.setattr(sys.modules["cl_bench.cli.jobs"], "float", signalled, raising=False)
    status, out, err = cli("+strategy=finetune", *TINY, "run_dir=out")
    assert status == 0
    assert "everything about this run is in out" in out
    assert f"{signal.Signals(number).name} came when the run was completed" in err
    assert "resume=" not in err
    assert is_finished("out")


def test_a_signal_when_a_job_is_completed_ends_the_sweep(cli, monkeypatch):
    def signalled(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return []

    monkeypatch.setattr(sys.modules["cl_bench.experiment.conduct"], "write_figures", signalled)
    status, _, err = cli("-m", "+strategy=finetune", *TINY, "seed=0,1", "sweep_dir=study")
    assert status == 143
    assert "go on with the sweep" in err
    assert len(runs_of("study")) == 1


def test_a_list_whose_reader_leaves_is_no_failure(cli, monkeypatch):
    def leave(*arguments):
        signal.raise_signal(signal.SIGHUP)

    monkeypatch.setattr(sys.modules["cl_bench.cli.jobs"], "print_listing", leave)
    assert cli() == (0, "", "")


# --- sweeps that come to nothing ------------------------------------------------------------------


def test_a_sweep_that_ran_nothing_is_no_success(cli):
    status, _, err = cli("-m", "seed=0,1")
    assert status == 2
    assert "no job of the sweep was run" in err


def test_a_sweep_with_a_job_that_did_not_finish_is_no_success(cli, monkeypatch):
    monkeypatch.setattr(
        SweepJob,
        "run",
        lambda self, fresh, go_on: self.ledger.write("interrupted", self.name) or 0.5,
    )
    status, _, err = cli("-m", "+strategy=finetune", *TINY, "seed=0,1", "sweep_dir=study")
    assert status == 2
    assert "2 of the jobs did not finish" in err


# --- names ----------------------------------------------------------------------------------------

NAMES = ["a[/b]", "[bold]x", "[link=", "$a_{$", "_"]


def test_names_are_shown_as_they_are(tmp_path):
    with open_record(tmp_path / "run", NAMES, task_id_known=False, facts={"stream": "[/s]"}) as run:
        for row in range(len(NAMES) + 1):
            run.row(row, None, dict.fromkeys(NAMES, 0.5), 0.0)
    console = Console(width=120, record=True, quiet=False, file=open(os.devnull, "w"))  # noqa: SIM115
    print_run(tmp_path / "run", console)
    said = console.export_text()
    assert all(name in said for name in NAMES)
    assert all(path.stat().st_size > 1000 for path in write_figures(tmp_path / "run"))


@pytest.mark.parametrize("name", ["", " ", "\ud800", 7])
def test_names_that_cannot_be_written_are_refused(name):
    stream = make_stream()
    stream.tasks[1].name = name
    with pytest.raises(UsageError, match="a task is called"):
        check_tasks(stream)


# --- data -----------------------------------------------------------------------------------------

ODD = {
    "int32": ("y", lambda v: v.int(), r"'y' is int32 of shape \(40,\) and must be int64"),
    "column": ("y", lambda v: v[:, None], r"'y' is int64 of shape \(40, 1\) and must be int64 of"),
    "one-hot": ("y", torch.nn.functional.one_hot, r"'y' is int64 of shape \(40, 9\)"),
    "float": ("y", lambda v: v.float(), "'y' is float32"),
    "uint8": ("x", lambda v: v.byte(), r"'x' is uint8 .* must be float32 .* x.float\(\) / 255"),
    "float64": ("x", lambda v: v.double(), "'x' is float64 .* must be float32"),
    "folded": ("x", lambda v: v.reshape(-1, 3, 4), r"'x' is float32 of shape \(40, 3, 4\)"),
    "infinite": ("x", lambda v: v / 0, "'x' holds values that are NaN or infinite"),
    "other": ("task", lambda v: v + 1, "'task' is .* and must be the task's index, 2"),
    "no": ("task", None, r"must hold 'task' too, since the task id is known at test time; .*full"),
    "none": ("y", None, "must hold 'y' too"),
}


def with_data(change, part="train", scenario="task"):
    stream = make_stream(scenario)
    task = stream.tasks[2]  # the last one, which is learned after hours
    kind = type("Odd", (type(task),), {part: property(lambda self: change(self.data))})
    task.__class__ = kind
    return stream


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("kind", ODD)
def test_data_that_no_learner_takes_is_told_in_a_line(kind, part):
    name, change, message = ODD[kind]

    def changed(data):
        tensors = dict(data.tensors)
        values = tensors.pop(name)
        return MemoryData(tensors if change is None else tensors | {name: change(values)})

    split = {"train": "training"}.get(part, part)
    with pytest.raises(UsageError, match=f"^stream 'toy', task 't2', {split} data: .*{message}"):
        check_tasks(with_data(changed, part))


def test_a_task_id_that_nobody_needs_may_be_missing():
    def without(data):
        return MemoryData({k: v for k, v in data.tensors.items() if k != "task"})

    check_tasks(with_data(without, scenario="domain"))


class Pairs:
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return tuple(self.data[index].values())


def test_data_of_another_form_is_told_in_a_line():
    with pytest.raises(UsageError, match=r"data\[index\] gives tuple, and must give a dictionary"):
        check_tasks(with_data(Pairs))


# --- threads --------------------------------------------------------------------------------------


@pytest.fixture
def plain(monkeypatch):
    """No variable speaks of threads."""
    for name in (*threads.NUMBERS, *threads.WAITS):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def place(root, where, text):
    path = root / "sys/fs/cgroup" / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


QUOTAS = {
    "no group": ("", {}, 8),
    "none": ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n"}, 8),
    "own": ("0::/a/b\n", {"a/b/cpu.max": "300000 100000\n"}, 3),
    "around": ("0::/a/b\n", {"a/b/cpu.max": "600000 100000\n", "a/cpu.max": "250000 100000\n"}, 2),
    "less than a core": ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
    "container": ("0::/docker/7\n", {"cpu.max": "200000 100000\n"}, 2),
    "version 1": (
        "4:cpu,cpuacct:/a\n3:memory:/a\n",
        {"cpu,cpuacct/a/cpu.cfs_quota_us": "400000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"},
        4,
    ),
    "version 1, none": ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1"}, 8),
    "both": (
        "1:memory:/\n0::/s\n",
        {"unified/s/cpu.max": "500000 100000"},
        5,
    ),
}


@pytest.mark.parametrize("kind", QUOTAS)
def test_cores_that_affinity_and_quota_leave(tmp_path, monkeypatch, kind):
    lines, files, cores = QUOTAS[kind]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(lines)
    for where, text in files.items():
        place(tmp_path, where, text)
    assert threads.usable_cores(tmp_path) == cores
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1}, raising=False)
    assert threads.usable_cores(tmp_path) == 1


def test_auto_takes_what_may_be_used_and_yields_to_the_environment(plain):
    plain.setattr(torch, "get_num_threads", lambda: 16)
    plain.setattr(threads, "usable_cores", lambda: 6)
    assert threads.chosen("auto") == 6
    assert threads.chosen("auto", processes=4) == 1
    assert threads.chosen(12) == 12  # who names a number gets it
    plain.setattr(threads, "usable_cores", lambda: 64)
    assert threads.chosen("auto") == 16
    plain.setenv("OMP_NUM_THREADS", "3")
    assert threads.chosen("auto") is None


@pytest.mark.parametrize("value", [0, -1, 1.5, "many", True, None])
def test_a_number_of_threads_that_makes_no_sense(value):
    with pytest.raises(UsageError, match=r"trainer\.threads=.*use auto, or a whole number"):
        threads.check_threads(value)


def test_threads_sleep_unless_it_is_too_late_or_somebody_else_decides(plain):
    threads.wait_passively()  # torch is there
    assert "OMP_WAIT_POLICY" not in os.environ
    plain.delitem(sys.modules, "torch")
    plain.setenv("GOMP_SPINCOUNT", "7")
    threads.wait_passively()
    assert "OMP_WAIT_POLICY" not in os.environ
    plain.delenv("GOMP_SPINCOUNT")
    plain.setenv("OMP_WAIT_POLICY", "x")  # so that it is put back
    plain.delenv("OMP_WAIT_POLICY")
    threads.wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def environment(directory):
    return json.loads((Path(directory) / "environment.json").read_text())


def test_a_run_and_its_resume_compute_with_the_recorded_threads(cli, plain):
    before = torch.get_num_threads()
    seen = []
    original = torch.set_num_threads
    plain.setattr(torch, "set_num_threads", lambda n: (seen.append(n), original(n)))
    run = ("+strategy=finetune", *TINY, "run_dir=out")
    status, out, _ = cli(*run, "trainer.threads=3")
    assert (status, environment("out")["threads"], torch.get_num_threads()) == (0, 3, before)
    assert "threads:" not in out
    plain.setattr(threads, "usable_cores", lambda: 1)
    status, out, _ = cli("+strategy=finetune", *TINY, "run_dir=auto")
    assert (status, environment("auto")["threads"], torch.get_num_threads()) == (0, 1, before)
    assert out.count("trainer.threads=auto") == 1
    (Path("auto") / "summary.json").unlink()
    results = Path("auto/results.jsonl")
    results.write_text("".join(results.read_text().splitlines(True)[:-1]))
    original(before + 1)
    seen.clear()
    status, _, said = cli("resume=auto")
    assert status == 0, said
    assert set(seen[:-1]) == {1}  # the last one puts back what was
    assert torch.get_num_threads() == before + 1
    original(before)


def test_from_python_only_a_number_changes_anything(plain, tmp_path):
    from cl_bench import run

    before = torch.get_num_threads()
    plain.setattr(threads, "usable_cores", lambda: before + 3)
    overrides = [word for word in TINY if not word.startswith("+stream")]
    for setting, expected in (("auto", before), (before + 1, before + 1)):
        result = run(
            "permuted_digits",
            "finetune",
            overrides=[*overrides, f"trainer.threads={setting}"],
            run_dir=tmp_path / str(setting),
        )
        assert environment(result.directory)["threads"] == expected
        assert torch.get_num_threads() == before
    assert not any(name in os.environ for name in (*threads.NUMBERS, *threads.WAITS))


@pytest.mark.parametrize(
    ("codes", "status"), [((143, 143), 143), ((129,), 129), ((143, 1), None), ((-9, 143), None)]
)
def test_processes_that_a_signal_to_one_of_them_ended_in_order(hears_hangup, codes, status):
    failures = {n: SimpleNamespace(exitcode=code) for n, code in enumerate(codes)}
    stopped = launch._stopped(SimpleNamespace(failures=failures), lambda: "go on like this")
    assert (stopped and stopped.exit_status) == status
    if stopped:
        assert stopped.__notes__ == ["go on like this"]
