"""Ends of runs: signals, closed pipes, sweeps that come to nothing."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from dying import learn, momentum, same
from sweeps import TINY, runs_of

from cl_bench.cli.output import Outlet
from cl_bench.cli.sweep import SweepJob
from cl_bench.learners import BaseLearner
from cl_bench.parallel import launch
from cl_bench.tracking import ProgressDisplay, read_results
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


# --- threads --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "status"), [((143, 143), 143), ((129,), 129), ((143, 1), None), ((-9, 143), None)]
)
def test_processes_that_a_signal_to_one_of_them_ended_in_order(hears_hangup, codes, status):
    failures = {n: SimpleNamespace(exitcode=code) for n, code in enumerate(codes)}
    stopped = launch._stopped(SimpleNamespace(failures=failures), lambda: "go on like this")
    assert (stopped and stopped.exit_status) == status
    if stopped:
        assert stopped.__notes__ == ["go on like this"]
