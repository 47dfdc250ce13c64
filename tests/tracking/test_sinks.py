"""Sinks get what the files get; W&B may fail at any call."""

import json
import os
import subprocess
import sys
import warnings

import pytest
from PIL import Image
from recorded import NAMES, THIRD, learn_everything, opened
from wandb_files import history_rows, read_finished_wandb

from cl_bench.contracts import UsageError
from cl_bench.tracking import WandbSink, read_results, read_run, wandb_sink


class Listener:
    """A sink that remembers, and fails where it is told to."""

    name = "listener"

    def __init__(self, fails_at=None):
        self.heard = []
        self.fails_at = fails_at

    def __getattr__(self, method):
        if method not in ("start", "event", "finish", "figures", "close"):
            raise AttributeError(method)

        def call(*arguments, **named):
            if method == self.fails_at:
                raise ConnectionError("no network")
            self.heard.append((method, *arguments, *named.values()))

        return call


def whole_run(directory, sinks):
    """Record a run from start to end; returns the warnings about sinks."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with opened(directory, sinks=sinks) as record:
            learn_everything(record)
            record.finish()
            Image.new("RGB", (2, 2)).save(directory / "accuracy_matrix.png")
            record.figures([directory / "accuracy_matrix.png"])
    return [str(w.message) for w in seen if "gets nothing more" in str(w.message)]


def test_sinks_get_what_the_files_get(tmp_path):
    sink = Listener()
    with opened(tmp_path / "run", sinks=[sink]) as record:
        learn_everything(record)
        summary = record.finish()
        record.figures([tmp_path / "a.png"])
    assert [e[1] for e in sink.heard if e[0] == "event"] == read_results(tmp_path / "run")
    assert sink.heard[0] == ("start", NAMES)
    assert sink.heard[-2:] == [("figures", [tmp_path / "a.png"]), ("close", False)]
    finish = next(e for e in sink.heard if e[0] == "finish")
    assert finish[1] == summary
    assert finish[3].shape == (3, 2)


@pytest.mark.parametrize("method", ["start", "event", "finish", "figures", "close"])
def test_a_failing_sink_is_dropped_with_one_warning_and_the_run_goes_on(tmp_path, method):
    bad, good = Listener(fails_at=method), Listener()
    warned = whole_run(tmp_path / "run", [bad, good])
    assert len(warned) == 1
    assert "listener failed" in warned[0]
    assert "ConnectionError: no network" in warned[0]
    assert ("close", True) in bad.heard or method == "close"
    assert len(good.heard) == 4 + len(read_results(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "completed"


def test_every_wandb_call_may_raise(tmp_path, monkeypatch):
    import wandb

    def down(*_, **__):
        raise wandb.errors.CommError("the server is gone")

    monkeypatch.setattr(wandb, "init", down)
    sink = wandb_sink(tmp_path / "run", {}, mode="online")
    warned = whole_run(tmp_path / "run", [sink])
    assert len(warned) == 1
    assert "Weights & Biases failed" in warned[0]
    assert "the server is gone" in warned[0]
    assert read_run(tmp_path / "run").status == "completed"


class BrokenRun:
    """A W&B run that started and then lost everything: whatever is touched raises."""

    def __getattr__(self, name):
        raise ConnectionError(f"{name}: connection reset")


def test_a_wandb_run_may_break_after_it_started(tmp_path, monkeypatch):
    sink = WandbSink(tmp_path / "run", {}, mode="offline")
    monkeypatch.setattr(WandbSink, "start", lambda self, names: None)
    monkeypatch.setattr(WandbSink, "logger", BrokenRun())
    warned = whole_run(tmp_path / "run", [sink])
    assert len(warned) == 1
    assert "connection reset" in warned[0]
    assert read_run(tmp_path / "run").status == "completed"


def test_wandb_disabled_is_no_sink_and_no_import():
    code = (
        "import sys\n"
        "from cl_bench.tracking import wandb_sink\n"
        "assert wandb_sink('run', {}, mode='disabled') is None\n"
        "assert wandb_sink('run', {}, mode='offline') is not None\n"
        "assert 'wandb' not in sys.modules and 'lightning' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_wandb_mode_is_refused():
    with pytest.raises(UsageError, match=r"logger\.mode=on: use online, offline or disabled"):
        wandb_sink("run", {}, mode="on")


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory):
    """A real offline run, and what its file holds."""
    run = tmp_path_factory.mktemp("wandb") / "run"
    sink = wandb_sink(run, {"seed": 0, "strategy": {"threshold": 0.95}})
    failed = whole_run(run, [sink])
    if failed and not sink.started:
        pytest.skip(f"W&B cannot start here: {failed[0]}")
    assert not failed
    return run, read_finished_wandb(next((run / "wandb").glob("offline-run-*/*.wandb")))


def test_wandb_rows_are_on_their_own_axes(offline_run):
    history = history_rows(offline_run[1])
    seen = [row["eval/mean_over_seen"] for row in history if "eval/mean_over_seen" in row]
    assert seen == pytest.approx([0.9, (THIRD + 0.8) / 2])
    assert [row["task"] for row in history if "eval/perm-1" in row] == [0, 1, 2]
    assert [row["eval/perm-2"] for row in history if "eval/perm-2" in row] == [0.2, 0.3, 0.8]
    assert [row["global_epoch"] for row in history if "train/loss" in row] == [1, 2]
    assert [row["layers/net.0/rank"] for row in history if "layers/net.0/rank" in row] == [3, 4]
    axes = {
        r.metric.glob_name or r.metric.name: r.metric.step_metric
        for r in offline_run[1]
        if r.WhichOneof("record_type") == "metric"
    }
    assert axes == {
        "task": "",
        "global_epoch": "",
        "eval/*": "task",
        "layers/*": "task",
        "train/*": "global_epoch",
        "alignment/*": "task",
        "dynamics/*": "task",
        "landscape/*": "task",
        "connectivity/*": "task",
        "divergence/*": "task",
        "general_text/*": "task",
        "general/*": "task",
        "cost/*": "task",
        "curve_step": "",
        "curve/*": "curve_step",
        "global_steps": "",
        "steps/*": "global_steps",
    }


def test_wandb_gets_summary_table_and_picture(offline_run):
    run, records = offline_run
    summary = {}
    for record in records:
        if record.WhichOneof("record_type") == "summary":
            summary |= {i.key: json.loads(i.value_json) for i in record.summary.update}
    assert summary["acc"] == pytest.approx((THIRD + 0.8) / 2)
    assert summary["status"] == "completed"
    table = next((run / "wandb").rglob("accuracy_matrix*.table.json"))
    assert json.loads(table.read_text()) == {
        "columns": ["after_task", *NAMES],
        "data": [[0, 0.1, 0.2], [1, 0.9, 0.3], [2, THIRD, 0.8]],
    }
    assert list((run / "wandb").rglob("media/images/figures/accuracy_matrix*.png"))


def test_a_wandb_run_leaves_the_process_as_it_was(offline_run):
    import wandb

    assert "WANDB_MODE" not in os.environ
    assert wandb.run is None
