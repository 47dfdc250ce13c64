"""Streams of tensors that are at hand."""

import re
from pathlib import Path

import pytest
import torch

from cl_bench.contracts import UsageError
from cl_bench.experiment import check_tasks
from cl_bench.tasks.tensors import TensorTask, from_tensors

X = torch.arange(12.0).reshape(6, 2)
Y = torch.tensor([0, 1, 0, 1, 0, 1])


def whole(data):
    return data[torch.arange(len(data))]


def test_tasks_share_classes_or_have_their_own():
    test = (X[:2] + 1, Y[:2])
    domain = from_tensors([{"train": (X, Y), "test": test, "validation": test}, (X, Y * 2)])
    assert (domain.heads, domain.input_shape, domain.task_id_at_test) == ([3], (2,), False)
    assert torch.equal(whole(domain[0].test)["x"], X[:2] + 1)
    assert len(domain[0].validation) == 2
    assert len(domain[1].validation) == 0
    assert domain[1].test is domain[1].train
    assert domain[1].facts == {"scored_on": "training data"}, "the record says what is scored"
    assert domain[0].facts == {}
    assert set(whole(domain[0].train)) == {"x", "y"}, "nobody is told the task"
    for scenario in ("task", "class"):
        own = from_tensors([(X, Y), (X, Y + 2)], scenario)
        again = from_tensors([(X, Y), (X, Y)], scenario, labels="task", names=["a", "b"])
        assert own.heads == again.heads == [2, 2]
        assert own[1].classes == range(2, 4)
        assert torch.equal(whole(own[1].train)["y"], whole(again[1].train)["y"])
        assert ("task" in whole(own[1].train)) == (scenario == "task")
        assert own.fingerprint != domain.fingerprint
        check_tasks(own)
    check_tasks(domain)


def test_the_same_numbers_have_the_same_fingerprint():
    one, other = from_tensors([(X, Y)]), from_tensors([(X.clone(), Y.clone())])
    assert one.fingerprint == other.fingerprint
    assert from_tensors([(X + 1, Y)]).fingerprint != one.fingerprint


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        (
            [(X.double(), Y)],
            {},
            "'task_0', train: x is float64 of shape (6, 2) and must be float32",
        ),
        ([(X, Y.int())], {}, "y is int32 of shape (6,) and must be int64 of shape (6,)"),
        ([(X, Y[:5])], {}, "y is int64 of shape (5,) and must be int64 of shape (6,)"),
        ([(X[:, 0], Y)], {}, "x is float32 of shape (6,) and must be float32 of shape (n, ...)"),
        ([X], {}, "give a pair of tensors (x, y), not Tensor"),
        ([(X[:0], Y[:0])], {}, "there are no samples"),
        (
            [{"train": (X, Y), "tests": (X, Y)}],
            {},
            "has train, tests: give train, validation, test",
        ),
        ([{"train": (X, Y), "test": (X[:, :1], Y)}], {}, "samples of train have shape (2,)"),
        ([(X, Y), (X[:, :1], Y)], {}, "give all one shape"),
        ([(X, Y), (X, Y)], {"scenario": "class"}, "label 0 comes before 2, its first; number"),
        ([(X, Y - 1)], {}, "label -1 comes before 0"),
        ([(X, Y)], {"names": ["a", "b"]}, "names: 2 for 1 tasks"),
        ([], {}, "has no tasks"),
    ],
)
def test_what_is_no_stream_is_refused(tasks, options, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        from_tensors(tasks, **options)


def test_a_task_alone_counts_its_classes():
    task = TensorTask(3, (X, Y), validation=(X, Y + 2))
    assert (task.name, task.classes, task.head) == ("task_3", range(4), 0)
    assert set(whole(task.train)["task"].tolist()) == {3}


def test_the_example_of_the_docs_runs_as_it_is_printed(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs/streams.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(block, "streams.md", "exec"), names)
    matrix = names["result"].matrix
    assert matrix.shape == (3, 2)
    assert matrix[1, 0] > 0.9, "the first task is learned"
    assert "before" in capsys.readouterr().out
