"""A summary of the accuracy matrix is a file: nothing of ours names it."""

import importlib
import json

import numpy as np
import pytest
from omegaconf import OmegaConf
from rich.console import Console

from cl_bench.cli import settings
from cl_bench.contracts import UsageError
from cl_bench.metrics import (
    Evidence,
    further_summaries,
    summaries,
    summarise,
    summarise_further,
)
from cl_bench.report import quantities, summary_table
from cl_bench.report.comparison import compare_runs, recorded_by_one
from cl_bench.tracking import open_record

package = importlib.import_module("cl_bench.metrics.summaries")

CODE = """
from cl_bench.metrics.summaries.summary import Summary


def worst(R):
    return float(R[-1].min())


SUMMARY = Summary("worst", "lowest score at the end", worst, signed=True)
"""

COUNTED = """
from cl_bench.metrics.summaries.summary import Further


def samples(evidence):
    return None if evidence.samples is None else float(sum(evidence.samples)) / 1000


FURTHER = Further(samples, "samples", "thousands of them", better=-1)
"""


@pytest.fixture
def worst(tmp_path, monkeypatch):
    """Summaries of somebody's own, files beside ours."""
    (tmp_path / "worst.py").write_text(CODE)
    (tmp_path / "counted.py").write_text(COUNTED)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    summaries.cache_clear()
    further_summaries.cache_clear()
    importlib.reload(quantities)
    yield
    monkeypatch.undo()
    summaries.cache_clear()
    further_summaries.cache_clear()
    importlib.reload(quantities)


def test_ours_stand_in_the_order_of_the_papers():
    ours = ["acc", "bwt", "fwt", "forgetting", "learning_accuracy", "average_incremental_accuracy"]
    assert list(summaries())[: len(ours)] == ours
    assert list(quantities.METRICS) == [
        *summaries(),
        "intransigence",
        "task_aware_acc",
        *quantities.MORE,
    ]
    less = {key for key, (_, better) in quantities.METRICS.items() if better < 0}
    assert less >= {"forgetting", "intransigence", "recency_bias", "stability_gap"}
    assert not less & {"acc", "bwt", "fwt", "learning_accuracy"}


def test_a_file_is_enough(worst):
    R = np.array([[0.1, 0.1], [0.9, 0.1], [0.6, 0.8]])
    found = summarise(R)
    assert list(found)[-1] == "worst"
    assert found["worst"] == 0.6
    console = Console(width=100)
    with console.capture() as capture:
        console.print(summary_table(found, task_id_known=True))
    (row,) = [line for line in capture.get().splitlines() if line.startswith("worst")]
    assert row.strip().split(maxsplit=2) == ["worst", "+60.0", "lowest score at the end"]
    assert quantities.METRICS["worst"] == ("worst", 1)
    assert quantities.METRICS["counted"] == ("samples", -1)
    assert summarise_further(Evidence(R, [5, 10]))["counted"] == 0.015
    assert summarise_further(Evidence(R)) == {}
    assert np.isnan(summarise(np.full((3, 2), np.nan))["worst"])


def test_a_run_of_before_it_was_there_reproduces(worst, tmp_path):
    for name in ("before", "now"):
        with open_record(tmp_path / name, ["a", "b"], task_id_known=True) as record:
            record.row(0, None, {"a": 0.1, "b": 0.1}, 0.1)
            record.row(1, 0, {"a": 0.9, "b": 0.1}, 0.1)
            record.row(2, 1, {"a": 0.6, "b": 0.8}, 0.1)
            record.finish()
    before, now = tmp_path / "before", tmp_path / "now"
    path = before / "summary.json"
    summary = json.loads(path.read_text())
    assert summary.pop("worst") == 0.6
    path.write_text(json.dumps(summary))
    assert compare_runs(before, now) == compare_runs(now, before) == []
    assert recorded_by_one(before, now) == ["worst"]
    path.write_text(json.dumps({**summary, "acc": 0.0}))
    assert [d.what for d in compare_runs(before, now)] == ["summary"]


def test_any_summary_may_be_quoted_and_nothing_else():
    right = OmegaConf.create({"reference": {"acc": 93.9, "learning_accuracy": 95, "fwt_std": 0.1}})
    assert settings.check_top_level(right) is False
    for reference, said in (
        ({"worst": 3.0}, "reference.worst=3.0: no such number is compared; there are strategy, "),
        ({"bwt": "low"}, "reference.bwt=low: "),
        ({"seeds": 0}, "reference.seeds=0: "),
    ):
        with pytest.raises(UsageError) as caught:
            settings.check_top_level(OmegaConf.create({"reference": reference}))
        assert said in str(caught.value)
