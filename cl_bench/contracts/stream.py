"""Streams: the sequence of tasks a learner meets, and what it may know about them."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, overload, runtime_checkable

import torch
from torch import Tensor

from cl_bench.contracts.errors import UsageError
from cl_bench.contracts.randomness import generator

Batch = dict[str, Tensor]
"""One batch: named tensors whose first dimension counts samples.

Vision streams use ``x`` (n, *input_shape), ``y`` (n,) the position of the class in the stream's
label space and, where the task id is known at test time, ``task`` (n,) the task's index.
"""

Scenario = Literal["domain", "task", "class"]
"""van de Ven & Tolias (2019): same labels and one head (``domain``), a head per task with the task
id known at test time (``task``), one growing head without it (``class``)."""


@runtime_checkable
class Data(Protocol):
    """Samples that are fetched many at a time: ``data[LongTensor] -> Batch``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor) -> Batch: ...


@dataclass(frozen=True)
class Origin:
    """Where data comes from: printed in the record, in model cards and by ``cl-bench``."""

    source: str
    licence: str
    citation: str


class Task(ABC):
    """One task of a stream.

    Attributes:
        name: unique within the stream; heads the columns of the accuracy matrix.
        index: position in the stream, from 0.
        classes: positions of its classes in the stream's label space; every ``y`` lies in it.
        head: which output head serves it (0 for all tasks where the head is shared).
        metric: name of the per-sample score in [0, 1] that the accuracy matrix averages.
        origin: licence, source and citation of the data.
    """

    name: str
    index: int
    classes: range
    head: int
    metric: str = "accuracy"
    origin: Origin

    @property
    @abstractmethod
    def train(self) -> Data:
        """Training data. Held only while somebody uses it: streams need not fit in memory."""

    @property
    @abstractmethod
    def validation(self) -> Data:
        """Data for early stopping and for search; never part of :attr:`test`. May be empty."""

    @property
    @abstractmethod
    def test(self) -> Data:
        """Data that only the accuracy matrix sees."""

    def sample(self, n: int, seed: int) -> Batch:
        """``n`` training samples (fewer if the task has fewer), uniform, without replacement."""
        data = self.train
        order = torch.randperm(len(data), generator=generator(seed, "sample", self.index))
        return data[order[:n]]


class Stream(Sequence[Task]):
    """A sequence of tasks: ``len``, index, slice, iterate.

    Args:
        name: as in the run directory and in tables.
        tasks: in the order in which they are learned.
        scenario: what is known at test time.
        input_shape: shape of one sample of ``x``, without the batch dimension.
        fingerprint: content hash of the data under the stream.
        modality: ``"image"``, ``"text"``, ...: checked against a strategy's needs.
    """

    def __init__(
        self,
        name: str,
        tasks: Sequence[Task],
        scenario: Scenario,
        input_shape: tuple[int, ...],
        fingerprint: str,
        modality: str = "image",
    ) -> None:
        if not tasks:
            raise UsageError(f"stream {name!r} has no tasks: ask for at least one (num_tasks >= 1)")
        names = [task.name for task in tasks]
        if len(set(names)) != len(names):
            raise UsageError(f"stream {name!r}: task names must differ, got {names}")
        self.name = name
        self.tasks = tuple(tasks)
        self.scenario = scenario
        self.input_shape = tuple(input_shape)
        self.fingerprint = fingerprint
        self.modality = modality

    @property
    def heads(self) -> list[int]:
        """Number of classes of each output head, heads in order."""
        sizes = {task.head: len(task.classes) for task in self.tasks}
        return [sizes[head] for head in sorted(sizes)]

    @property
    def task_id_at_test(self) -> bool:
        """Whether every score of this stream was reached with the task id known."""
        return self.scenario == "task"

    def __len__(self) -> int:
        return len(self.tasks)

    @overload
    def __getitem__(self, index: int) -> Task: ...

    @overload
    def __getitem__(self, index: slice) -> "Stream": ...

    def __getitem__(self, index: Any) -> "Task | Stream":
        if not isinstance(index, slice):
            return self.tasks[index]
        return Stream(
            self.name,
            self.tasks[index],
            self.scenario,
            self.input_shape,
            self.fingerprint,
            self.modality,
        )

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)
