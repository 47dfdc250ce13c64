"""All that is known of a task in somebody else's loop: a sample, its position, its classes."""

import copy
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from cl_bench.contracts import Batch, Data, Origin, Task, UsageError
from cl_bench.parallel.ranks import gathered

Sample = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""Inputs ``x``, a pair ``(x, y)``, or tensors by name: what a model and its loss take."""


class SampledTask(Task):
    """A task of somebody else's loop: all that is known of it is a sample and its position.

    Processes that train together may give different samples: each has all of them then.

    Args:
        sample: inputs, ``(inputs, labels)``, or tensors by name; some of the training data, or all.
        index: position of the task, from 0.
        classes: its positions in the label space.
        head: which output head serves it.
        name: as it is called in a report.

    Raises:
        UsageError: the sample is none of these, is empty, or its tensors differ in length.
    """

    origin = Origin(source="given by the caller", licence="unknown", citation="")

    def __init__(
        self,
        sample: Sample,
        index: int,
        classes: range = range(0),
        head: int = 0,
        name: str | None = None,
    ) -> None:
        self.batch = _of_all(as_batch(sample))
        self.index, self.classes, self.head = index, classes, head
        self.name = f"task_{index}" if name is None else name
        self._data: Data | None = _Rows(self.batch)

    @property
    def train(self) -> Data:
        """The sample.

        Raises:
            UsageError: it is not held any more.
        """
        if self._data is None:
            raise UsageError(
                f"the data of task {self.name!r} is not in the state that was loaded, and the "
                "strategy asks for it: learn the tasks in one process, from the first on"
            )
        return self._data

    @property
    def validation(self) -> Data:
        """Nothing."""
        return _Rows({name: value[:0] for name, value in self.batch.items()})

    @property
    def test(self) -> Data:
        """Nothing."""
        return self.validation

    def bare(self) -> Self:
        """The task without its data."""
        found = copy.copy(self)
        found.batch = {name: value[:0].clone() for name, value in self.batch.items()}
        found._data = None
        return found


class _Rows(Data):
    def __init__(self, batch: Batch) -> None:
        self.tensors = batch

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: Tensor) -> Batch:
        return {name: value[index.to(value.device)] for name, value in self.tensors.items()}


class Met(Sequence[SampledTask]):
    """The tasks that a loop has met so far, and how many come in all, where it said so."""

    name = "of your loop"

    def __init__(self, tasks: Sequence[SampledTask], num_tasks: int | None = None) -> None:
        self.tasks = list(tasks)
        self.num_tasks = num_tasks

    def __len__(self) -> int:
        if self.num_tasks is None:
            raise UsageError(
                "the strategy asks how many tasks come: say so, Guarded(..., num_tasks=5), or have "
                "it act in every task (Joint(when='every'))"
            )
        return self.num_tasks

    def __getitem__(self, index: int | slice) -> "SampledTask | list[SampledTask]":  # type: ignore[override]
        return self.tasks[index]

    def __iter__(self):  # type: ignore[no-untyped-def]  # noqa: ANN204
        return iter(self.tasks)


def as_batch(sample: Sample) -> Batch:
    """The sample as named tensors; see :class:`SampledTask`."""
    if isinstance(sample, Tensor):
        batch = {"x": sample}
    elif isinstance(sample, Mapping):
        batch = dict(sample)
    elif isinstance(sample, tuple | list) and len(sample) == 2:
        batch = {"x": sample[0], "y": sample[1]}
    else:
        batch = {}
    if not batch or not all(isinstance(value, Tensor) and value.dim() for value in batch.values()):
        raise UsageError(
            f"sample={type(sample).__name__}: give tensors of some of the task's training data, "
            "sample=x, sample=(x, y) or sample={'input_ids': ..., ...}"
        )
    lengths = {name: len(value) for name, value in batch.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise UsageError(f"sample: every tensor needs as many rows as samples, got {lengths}")
    return batch


def _of_all(batch: Batch) -> Batch:
    """What all processes have given; once, where they gave the same."""
    everyones = gathered({name: value.cpu() for name, value in batch.items()})
    first = everyones[0]
    if all(_same(first, other) for other in everyones[1:]):
        return batch
    return {name: torch.cat([one[name] for one in everyones]) for name in first}


def _same(one: Batch, other: Batch) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
