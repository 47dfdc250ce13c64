"""Measures of class-incremental learning, against numbers computed by hand."""

import json

import numpy as np
import pytest

from cl_bench.metrics import Evidence, further_summaries, summarise_further
from cl_bench.metrics.summaries.min_acc import min_accuracy
from cl_bench.metrics.summaries.recency_bias import recency_bias
from cl_bench.metrics.summaries.stability_gap import stability_gap
from cl_bench.metrics.summaries.wc_acc import worst_case_accuracy
from cl_bench.report import print_run, write_figures
from cl_bench.report.page import page_data
from cl_bench.report.study import read_study
from cl_bench.tracking import open_record, read_run

NAN = np.nan
R = np.array(
    [
        [NAN, NAN, NAN],
        [0.8, NAN, NAN],
        [0.6, 0.9, NAN],
        [0.5, 0.4, 1.0],
    ]
)
SAMPLES = [50, 25, 25]
CURVES = [
    [],
    # Steps of task 2: scores of task 1, of task 2 itself.
    [(0, np.array([0.8, 0.0])), (1, np.array([0.3, 0.5])), (9, np.array([0.6, 0.9]))],
    # Of task 3: task 1 dips to .2 and comes back to .5, task 2 falls and stays.
    [
        (0, np.array([0.6, 0.9, 0.0])),
        (1, np.array([0.2, 0.7, 0.4])),
        (9, np.array([0.5, 0.4, 1.0])),
    ],
]
CONFUSION = np.array([[0.5, 0.1, 0.4], [0.2, 0.4, 0.4], [0.0, 0.0, 1.0]])


def test_accuracies_by_task_and_by_sample():
    found = summarise_further(Evidence(R, SAMPLES))
    assert found == pytest.approx(
        {
            "last_accuracy_by_task": (0.5 + 0.4 + 1.0) / 3,
            "last_accuracy_by_sample": (50 * 0.5 + 25 * 0.4 + 25 * 1.0) / 100,
            "average_accuracy_by_task": (0.8 + (0.6 + 0.9) / 2 + 1.9 / 3) / 3,
            "average_accuracy_by_sample": (0.8 + (50 * 0.6 + 25 * 0.9) / 75 + 0.6) / 3,
        }
    )
    even = summarise_further(Evidence(R, [10, 10, 10]))
    assert even["last_accuracy_by_task"] == pytest.approx(even["last_accuracy_by_sample"])
    assert even["average_accuracy_by_task"] == pytest.approx(even["average_accuracy_by_sample"])


def test_recency_bias_is_what_old_tasks_lose_to_the_newest():
    assert recency_bias(CONFUSION) == pytest.approx(0.4)
    assert recency_bias(np.eye(3)) == 0
    assert np.isnan(recency_bias(np.ones((1, 1))))


def test_worst_scores_inside_tasks():
    # Task 1: .3, .6 in task 2, then .2, .5; task 2: .7, .4, for step 0 is its own end.
    assert min_accuracy(R, CURVES) == pytest.approx((0.2 + 0.4) / 2)
    assert worst_case_accuracy(R, CURVES) == pytest.approx(1 / 3 + 2 / 3 * 0.3)
    # What is seen at the ends of tasks alone hides the dips.
    ends = [[], [c for c in CURVES[1] if c[0] == 9], [c for c in CURVES[2] if c[0] == 9]]
    assert min_accuracy(R, ends) == pytest.approx((0.5 + 0.4) / 2)
    assert np.isnan(min_accuracy(R[:2, :1], CURVES[:1]))


def test_the_gap_is_what_comes_back():
    # Task 1 in task 2: min(.8, .6) - .3; in task 3: min(.6, .5) - .2; task 2 in task 3: .4 - .4.
    assert stability_gap(CURVES) == pytest.approx((0.3 + 0.3 + 0.0) / 3)
    falling = [[], [(0, np.array([0.8, 0])), (1, np.array([0.5, 0])), (2, np.array([0.1, 1]))]]
    assert stability_gap(falling) == 0, "forgetting that stays is no gap"


def test_nothing_is_said_without_what_it_needs():
    assert summarise_further(Evidence(R)) == {}
    assert list(summarise_further(Evidence(R, curves=CURVES))) == [
        "min_acc",
        "wc_acc",
        "stability_gap",
    ]


NAMES = ["a", "b", "c"]


def recorded(directory, scenario="class", dense=True, samples=SAMPLES, sinks=()):
    tasks = [{"name": n, "test_samples": s} for n, s in zip(NAMES, samples, strict=True)]
    data = {"scenario": scenario, "tasks": tasks, "fingerprint": "x"}
    facts = {"stream": "toy", "strategy": "er", "seed": 0}
    with open_record(
        directory, NAMES, task_id_known=False, data=data, facts=facts, config="a: 1\n", sinks=sinks
    ) as record:
        for row in range(1, 4):
            for step, values in CURVES[row - 1] if dense else ():
                scores = dict(zip(NAMES, map(float, values), strict=False))
                record.probe("curve", task=row - 1, values=scores, step=step)
            scores = {n: s for n, s in zip(NAMES, R[row], strict=True) if np.isfinite(s)}
            answered = {
                n: {f"answered_as/{j}": CONFUSION[i, j] if row == 3 else 0.0 for j in range(row)}
                for i, n in enumerate(NAMES[:row])
            }
            record.row(row, row - 1, scores, 0.1, answered if scenario == "class" else None)
    return json.loads((directory / "summary.json").read_text())


def test_the_record_sums_them_up_and_reports_show_them(tmp_path, capsys):
    summary = recorded(tmp_path / "run")
    expected = summarise_further(Evidence(R, SAMPLES, CONFUSION, CURVES))
    assert len(expected) == 8
    assert {k: summary[k] for k in expected} == pytest.approx(expected)
    assert summary["last_accuracy_by_task"] == summary["acc"]
    assert summary["average_accuracy_by_task"] == summary["average_incremental_accuracy"]
    np.testing.assert_allclose(summary["confusion_by_task"], CONFUSION)
    run = read_run(tmp_path / "run")
    assert run.incremental == pytest.approx(expected)
    print_run(tmp_path / "run")
    out = capsys.readouterr().out
    for name, value in (("recency bias", "40.0"), ("min-ACC", "30.0"), ("ACC by sample", "60.0")):
        assert any(line.split(name)[-1].split()[:1] == [value] for line in out.splitlines())
    names = [path.name for path in write_figures(tmp_path / "run")]
    assert names == ["accuracy_matrix.png", "forgetting.png", "confusion_by_task.png"]
    page = page_data(read_study([tmp_path / "run"]), [])
    (row,) = page["blocks"][0]["rows"]
    np.testing.assert_allclose(row["confusion"], 100 * CONFUSION)
    assert row["values"]["min_acc"]["text"] == "30.0"
    assert row["values"]["stability_gap"]["mean"] == pytest.approx(20)


def test_other_runs_have_none_of_them(tmp_path):
    summary = recorded(tmp_path / "domain", "domain", dense=False)
    assert not set(further_summaries()) & set(summary)
    older = recorded(tmp_path / "older", samples=[None] * 3, dense=False)
    assert "last_accuracy_by_sample" not in older
    assert [p.name for p in write_figures(tmp_path / "domain")] == [
        "accuracy_matrix.png",
        "forgetting.png",
    ]


def test_wandb_gets_numbers_and_a_table(monkeypatch):
    from types import SimpleNamespace

    from cl_bench.tracking.wandb import WandbSink

    summary, tables = {}, {}
    sink = object.__new__(WandbSink)
    logger = SimpleNamespace(
        experiment=SimpleNamespace(summary=summary),
        log_table=lambda name, columns, data: tables.update({name: (columns, data)}),
    )
    monkeypatch.setattr(WandbSink, "logger", logger)
    sink.finish({"acc": 0.5, "recency_bias": 0.4, "confusion_by_task": [[1.0]]}, ["a"], R[:2, :1])
    assert summary == {"acc": 0.5, "recency_bias": 0.4}
    assert tables["confusion_by_task"] == (["task", "a"], [["a", 1.0]])


def test_a_class_incremental_run_measures_its_confusion(cli, tmp_path):
    status, _, error = cli(
        "+strategy=finetune",
        "+stream=split_digits",
        "stream.scenario=class",
        "stream.num_tasks=3",
        "stream.classes_per_task=2",
        "trainer.max_epochs=1",
        "pack=1",
        "eval.dense=[1]",
        "alignment.enabled=false",
        "checkpoint.enabled=false",
        "logger.mode=disabled",
        "run_dir=out",
    )
    assert status == 0, error
    run = read_run(tmp_path / "out")
    np.testing.assert_allclose(run.confusion.sum(1), 1)
    # A sample's own task answers wherever its own class does.
    assert (np.diag(run.confusion) >= run.matrix[3] - 1e-12).all()
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["recency_bias"] == pytest.approx(run.confusion[:2, 2].mean())
    assert summary["min_acc"] <= run.matrix[3, :2].mean() + 1e-12
    data = json.loads((tmp_path / "out/data.json").read_text())
    counts = [task["test_samples"] for task in data["tasks"]]
    assert summary["last_accuracy_by_sample"] == pytest.approx(
        np.average(run.matrix[3], weights=counts)
    )
