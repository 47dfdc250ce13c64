"""Streams: the sequence of tasks a learner meets, and what it may know about them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Protocol, overload, runtime_checkable

import torch
from torch import Tensor

from cl_bench.contracts.errors import UsageError
from cl_bench.contracts.randomness import generator

Batch = dict[str, Tensor]
"""One batch: named tensors whose first dimension counts samples.

Vision streams use ``x`` (n, *input_shape), ``y`` (n,) the position of the class in the stream's
label space and, where the task id is known at test time, ``task`` (n,) the task's index. What
language streams use stands in :mod:`cl_bench.contracts.language`.
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


@dataclass(frozen=True)
class Recovery:
    """Two disjoint halves of a task, neither of which tells anything about the other's answers.

    Learning ``train`` anew can then bring back how the task is done, but not what was known of
    ``test``.

    Attributes:
        train: the half that is learned anew.
        test: the half that is scored.
        control: samples of the same kind that no learner ever saw: they must stay at chance.
    """

    train: Data
    test: Data
    control: Data | None = None


@dataclass(frozen=True)
class Pretraining:
    """What a learner learns before the first task. Row 0 of the matrix is measured after it.

    AdamW, its rate rising linearly for ``warmup`` steps and falling along a cosine afterwards.

    Attributes:
        identity: hash of everything that ``batches`` depends on, the seed aside.
        batches: endless batches from a seed.
        steps: optimizer steps.
        learning_rate: the highest rate.
        final_rate: the last rate as a share of the highest.
        warmup: steps until the highest rate.
        weight_decay: decoupled.
        eps: AdamW's.
    """

    identity: str
    batches: Callable[[int], Iterator[Batch]]
    steps: int
    learning_rate: float = 1e-3
    final_rate: float = 0.1
    warmup: int = 0
    weight_decay: float = 0.1
    eps: float = 1e-6

    def rate(self, step: int) -> float:
        """Share of the highest rate that step ``step`` (from 0) takes."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.final_rate + (1 - self.final_rate) * (1 + math.cos(math.pi * done)) / 2


class Task(ABC):
    """One task of a stream.

    Attributes:
        name: unique within the stream; heads the columns of the accuracy matrix.
        index: position in the stream, from 0.
        classes: positions of its classes in the stream's label space; every ``y`` lies in it.
        head: which output head serves it (0 for all tasks where the head is shared).
        metric: name of the per-sample score in [0, 1] that the accuracy matrix averages.
        epochs: how long it is learned; None leaves it to ``trainer.max_epochs``.
        rate: multiplies the optimizer's learning rate.
        recovery: halves for recovery experiments; None if the task has no such halves.
        facts: further plain values for the record, such as chance levels.
        origin: licence, source and citation of the data.
    """

    name: str
    index: int
    classes: range
    head: int
    metric: str = "accuracy"
    epochs: int | None = None
    rate: float = 1.0
    recovery: Recovery | None = None
    facts: Mapping[str, Any] = MappingProxyType({})
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

    @property
    def scored(self) -> Data:
        """What the accuracy matrix is made from: test data, except during a search."""
        return self.test

    @property
    def probes(self) -> Mapping[str, Data]:
        """Further data that is scored whenever :attr:`test` is, beside the matrix."""
        return {}

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
        task_id_at_test: whether the task id is known at test time, and scores say so; None where
            the scenario decides it (``task`` knows it, the others do not).

    Attributes:
        pretraining: what comes before the first task, if anything.
    """

    pretraining: Pretraining | None = None

    def __init__(
        self,
        name: str,
        tasks: Sequence[Task],
        scenario: Scenario,
        input_shape: tuple[int, ...],
        fingerprint: str,
        modality: str = "image",
        task_id_at_test: bool | None = None,
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
        self.task_id_at_test = scenario == "task" if task_id_at_test is None else task_id_at_test

    @property
    def heads(self) -> list[int]:
        """Number of classes of each output head, heads in order."""
        sizes = {task.head: len(task.classes) for task in self.tasks}
        return [sizes[head] for head in sorted(sizes)]

    def __len__(self) -> int:
        return len(self.tasks)

    @overload
    def __getitem__(self, index: int) -> Task: ...

    @overload
    def __getitem__(self, index: slice) -> "Stream": ...

    def __getitem__(self, index: Any) -> "Task | Stream":
        if not isinstance(index, slice):
            task: Task = self.tasks[index]
            return task
        return Stream(
            self.name,
            self.tasks[index],
            self.scenario,
            self.input_shape,
            self.fingerprint,
            self.modality,
            self.task_id_at_test,
        )

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)
