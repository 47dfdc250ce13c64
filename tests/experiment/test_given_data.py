"""Names and data of tasks: shown as they are, or refused in a line."""

import os

import pytest
import torch
from rich.console import Console
from toys import make_stream

from cl_bench.contracts import UsageError
from cl_bench.data import MemoryData
from cl_bench.experiment.checks import check_tasks
from cl_bench.report import print_run, write_figures
from cl_bench.tracking import open_record

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
