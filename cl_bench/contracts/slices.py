"""Part of a stream as a stream of its own: tasks, heads and classes counted from 0 again."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cl_bench.contracts.task import Batch, Data, Recovery, Side, Stored, Task, augmented, likewise


class RenumberedData:
    """Another stream's samples with the labels and the task id of this one.

    Args:
        data: the samples.
        shift: what is added to ``y``.
        task: what ``task`` becomes, where batches tell it.
    """

    def __init__(self, data: Data, shift: int, task: int) -> None:
        self.data = data
        self.shift = shift
        self.task = task

    def __len__(self) -> int:
        return len(self.data)

    @property
    def lengths(self) -> Tensor | None:
        """Of the samples, where the data knows them."""
        lengths: Tensor | None = getattr(self.data, "lengths", None)
        return lengths

    def augmented(self, seed: int) -> Data | None:
        """As of the data itself."""
        view = augmented(self.data, seed)
        return None if view is None else RenumberedData(view, self.shift, self.task)

    def likewise(self, data: Data) -> Data:
        """Other samples, already renumbered, changed in training as these are."""
        return likewise(self.data, data)

    def __getitem__(self, index: Tensor) -> Batch:
        """As of the data itself."""
        batch = dict(self.data[index])
        if "y" in batch:
            batch["y"] = batch["y"] + self.shift
        if "task" in batch:
            batch["task"] = torch.full_like(batch["task"], self.task)
        return batch


class RenumberedTask(Task):
    """A task at another place: of a slice that does not begin where its stream does.

    Args:
        task: the task.
        index: its position in the slice.
        head: its head there.
        start: the first of its classes there.
        tells_task: whether its batches tell the task id.
    """

    def __init__(self, task: Task, index: int, head: int, start: int, tells_task: bool) -> None:
        self.task = task
        self.index = index
        self.head = head
        self.classes = range(start, start + len(task.classes))
        self.name, self.metric, self.origin = task.name, task.metric, task.origin
        self.epochs, self.rate = task.epochs, task.rate
        self.ordered, self.kind = task.ordered, task.kind
        self._shift = start - task.classes.start
        self._same = self._shift == 0 and not (tells_task and index != task.index)

    def _seen(self, data: Data) -> Data:
        return data if self._same else RenumberedData(data, self._shift, self.index)

    @property
    def facts(self) -> Mapping[str, Any]:  # type: ignore[override]
        """Further plain values for the record."""
        return self.task.facts

    @property
    def recovery(self) -> Recovery | None:  # type: ignore[override]
        """Halves for recovery experiments."""
        halves = self.task.recovery
        if halves is None or self._same:
            return halves
        control = None if halves.control is None else self._seen(halves.control)
        train, test = self._seen(halves.train), self._seen(halves.test)
        return replace(halves, train=train, test=test, control=control)

    @property
    def train(self) -> Data:
        """Training data, held only while somebody uses it."""
        return self._seen(self.task.train)

    @property
    def validation(self) -> Data:
        """Data for early stopping and for search."""
        return self._seen(self.task.validation)

    @property
    def test(self) -> Data:
        """Data that only the accuracy matrix sees."""
        return self._seen(self.task.test)

    @property
    def scored(self) -> Data:
        """What the accuracy matrix is made from."""
        return self._seen(self.task.scored)

    @property
    def probes(self) -> Mapping[str, Data]:
        """Further data that is scored beside the matrix."""
        return {name: self._seen(data) for name, data in self.task.probes.items()}

    def stored(self, side: Side) -> Stored | None:
        """As of the task, with labels of the slice."""
        found = self.task.stored(side)
        if found is None:
            return None
        labels = self._seen(_Drawn(found.labels))[found.rows]
        return replace(found, labels=labels)

    def prepare(self, answer: Callable[[Batch], Tensor]) -> Mapping[str, float] | None:
        """As of the task."""
        return self.task.prepare(answer)

    def sample(self, n: int, seed: int) -> Batch:
        """The samples that the task draws in its own stream."""
        drawn = _Drawn(self.task.sample(n, seed))
        return self._seen(drawn)[torch.arange(len(drawn))]


class _Drawn:
    """One batch as data."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(next(iter(self.batch.values()), ()))

    def __getitem__(self, index: Tensor) -> Batch:
        return self.batch


def renumber(tasks: Sequence[Task], tells_task: bool) -> list[Task]:
    """``tasks`` with positions, heads and classes counted from 0 in this order.

    Tasks that are where they belong already are left as they are.

    Args:
        tasks: of one stream.
        tells_task: whether their batches tell the task id.
    """
    heads: dict[int, tuple[int, int]] = {}
    free, found = 0, []
    for index, task in enumerate(tasks):
        if task.head not in heads:
            heads[task.head] = len(heads), free
            free += len(task.classes)
        head, start = heads[task.head]
        place = (index, head, start)
        if place != (task.index, task.head, task.classes.start):
            task = RenumberedTask(task, *place, tells_task)
        found.append(task)
    return found
