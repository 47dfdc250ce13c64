"""Strategies that leave tasks out, in a loop that says how many come."""

import re

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from loops import data, loop, network, own_cache  # noqa: F401
from torch.optim import SGD

from cl_bench.contracts import UsageError
from cl_bench.integrations import Guarded
from cl_bench.strategies.baselines.joint import Joint


def last_alone(num_tasks, when="last"):
    """Two tasks of a loop that trains as long as it is told to."""
    model = network()
    guard = Guarded(model, Joint(when=when), num_tasks=num_tasks)
    lengths = []
    for t in range(2):
        with guard.task(sample=data(t), epochs=1) as lesson:
            optimizer = SGD(guard.param_groups(), lr=0.1)
            lengths.append(lesson.epochs)
            for _ in range(lesson.epochs):
                lengths.append(len(lesson.data))
                batch = lesson.data[torch.arange(0, len(lesson.data), 20)]
                optimizer.zero_grad()
                F.cross_entropy(model(batch["x"]), batch["y"]).backward()
                optimizer.step()
    assert guard.tasks == 2
    return lengths, [p.detach().clone() for p in model.parameters()]


def test_a_task_that_is_left_out_is_remembered_and_learned_with_the_last():
    whole = len(data(0)[0]) + len(data(1)[0])
    lengths, weights = last_alone(num_tasks=2)
    assert lengths == [0, 1, whole]
    every, same = last_alone(num_tasks=None, when="every")
    assert every == [1, len(data(0)[0]), 1, whole]
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))  # both start afresh


@pytest.mark.parametrize(
    ("num_tasks", "said"),
    [(None, "num_tasks=5"), (0, "num_tasks=0"), (2.0, "num_tasks=2.0"), (1, "this is task 2")],
)
def test_how_many_tasks_come_is_said(num_tasks, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        last_alone(num_tasks)


def test_a_loop_that_trains_what_is_left_out_is_stopped():
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    guard = Guarded(model, Joint(when="last"), num_tasks=2)
    with pytest.raises(UsageError, match=r"lesson\.epochs"), guard.task(optimizer, sample=data(0)):
        loop(model, optimizer, 0, epochs=1)
    assert guard.tasks == 0
