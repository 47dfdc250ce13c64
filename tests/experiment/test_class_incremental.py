"""Class-incremental evaluation: against hand-computed scores, beside the task-aware ones."""

import functools
import json

import numpy as np
import pytest
import torch
from lightning import Trainer
from rich.console import Console
from torch import nn
from torch.optim import SGD
from toys import Silent, ToyTask, make_learner

from cl_bench.cli import main
from cl_bench.contracts import Stream
from cl_bench.experiment import EvalSettings, Experiment, LightningEngine, LoopSettings
from cl_bench.metrics import average_incremental_accuracy
from cl_bench.report import print_run
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.tracking import open_record, read_run

# Three tasks with two classes each; samples are one-hot in six dimensions, so that logit c of a
# sample e_j is weight W[c, j]. Rows: classes 0 ... 5; columns: samples of the classes 0 ... 5.
WEIGHTS = torch.tensor(
    [
        # sample of class 0, 1, 2, 3, 4, 5
        [5.0, 0.0, 4.0, 0.0, 0.0, 0.0],
        [0.0, 5.0, 0.0, 0.0, 0.0, 9.0],
        [6.0, 0.0, 3.0, 2.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 1.0, 0.0, 0.0],
        [0.0, 7.0, 0.0, 0.0, 8.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 9.0, 1.0],
    ]
)
# By hand: the winner among the classes seen, and among the sample's own task's.
#   class 0: task 0 alone 0; of four 2; of six 2      own task: 0
#   class 1: 1; 1; 4                                  own task: 1
#   class 2: of four 0; of six 0                      own task: 2
#   class 3: of four 2; of six 2                      own task: 2
#   class 4: of six 5                                 own task: 5
#   class 5: of six 1                                 own task: 5
CLASS_INCREMENTAL = [[1.0, np.nan, np.nan], [0.5, 0.0, np.nan], [0.0, 0.0, 0.0]]
TASK_AWARE = [[1.0, np.nan, np.nan], [1.0, 0.5, np.nan], [1.0, 0.5, 0.5]]


class Untrained(Finetune):
    """Keeps the weights that the test has set."""

    def param_groups(self, learner):
        return [{"params": list(learner.heads.parameters()), "lr": 0.0}]


def one_hot_stream(scenario):
    tasks = []
    for t in range(3):
        y = torch.tensor([2 * t, 2 * t + 1])
        head = 0 if scenario == "domain" else t
        tasks.append(ToyTask(t, head, range(2 * t, 2 * t + 2), torch.eye(6)[y], y))
    return Stream("one_hot", tasks, scenario, (6,), "one_hot")


@pytest.fixture(params=["class", "task"])
def recorded(request, tmp_path):
    """(scenario, directory) of a run with the weights above."""
    stream = one_hot_stream(request.param)
    learner = make_learner(stream, nn.Flatten(), functools.partial(SGD, lr=0.05))
    for t, head in enumerate(learner.heads):
        head.weight.data = WEIGHTS[2 * t : 2 * t + 2].clone()
    trainer = functools.partial(
        Trainer,
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    record = open_record(tmp_path / "run", ["t0", "t1", "t2"], task_id_known=stream.task_id_at_test)
    strategy = Untrained()
    with record:
        engine = LightningEngine(
            learner, strategy, trainer, LoopSettings(batch_size=2), None, record, Silent()
        )
        Experiment(stream, strategy, engine, EvalSettings(), record, Silent()).run()
    return request.param, tmp_path / "run"


def test_scores_are_those_computed_by_hand(recorded):
    scenario, directory = recorded
    run = read_run(directory)
    expected = CLASS_INCREMENTAL if scenario == "class" else TASK_AWARE
    np.testing.assert_array_equal(run.matrix[1:], expected)
    beside = TASK_AWARE if scenario == "class" else np.full((3, 3), np.nan)
    np.testing.assert_array_equal(run.task_aware[1:], beside)
    assert average_incremental_accuracy(run.matrix) == pytest.approx(
        (1.0 + 0.25 + 0.0) / 3 if scenario == "class" else (1.0 + 0.75 + 2 / 3) / 3
    )


def test_summary_and_table_show_both_scores(recorded):
    scenario, directory = recorded
    summary = json.loads((directory / "summary.json").read_text())
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_run(directory, console)
    lines = {line.split()[0]: line.split() for line in console.export_text().splitlines() if line}
    if scenario == "task":
        assert not any(key.startswith("task_aware") for key in summary)
        assert lines["ACC"][1:3] == ["66.7", "mean"]
        return
    assert (summary["acc"], summary["task_id_known"]) == (0.0, False)
    assert summary["task_aware_acc"] == pytest.approx(2 / 3)
    assert summary["task_aware_bwt"] == 0.0
    # Of task 0 everything, of task 1 nothing was there to be lost: (-1 + 0) / 2.
    assert summary["bwt"] == -0.5
    assert lines["ACC"][1:3] == ["0.0", "66.7"]
    assert lines["BWT"][1:3] == ["-50.0", "+0.0"]


def test_the_head_grows_with_the_classes_seen():
    stream = one_hot_stream("class")
    learner = make_learner(stream, nn.Flatten())
    batch = {"x": torch.eye(6), "y": torch.arange(6)}
    for t, task in enumerate(stream):
        learner.begin(task, Finetune())
        assert learner(batch).shape == (6, 2 * (t + 1))
        learnt = [i for i, head in enumerate(learner.heads) if head.weight.requires_grad]
        assert learnt == list(range(t + 1)), "all classes seen compete in the loss"


def test_details_name_the_task_aware_score_of_every_cell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "+strategy=er",
        "+stream=split_digits",
        "stream.scenario=class",
        "stream.num_tasks=3",
        "trainer.max_epochs=2",
        "logger.mode=disabled",
        "run_dir=out",
    ]
    monkeypatch.setattr("sys.argv", ["cl_bench", *arguments])
    assert main() == 0
    lines = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    rows = [line for line in lines if line["event"] == "evaluation"][1:]
    for i, row in enumerate(rows, start=1):
        assert len(row["scores"]) == len(row["details"]) == i
        for name, score in row["scores"].items():
            assert row["details"][name]["task_aware_accuracy"] >= score
    assert (
        rows[0]["details"]["classes_0-1"]["task_aware_accuracy"] == rows[0]["scores"]["classes_0-1"]
    )
    assert read_run(tmp_path / "out").task_aware[3].min() > 0.6
