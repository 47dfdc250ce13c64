"""Streams: the sequence of tasks a learner meets, and what it may know about them."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, overload

import torch

from cl_bench.contracts.checking import checked
from cl_bench.contracts.errors import UsageError
from cl_bench.contracts.options import Index, Rate, Share, Strength
from cl_bench.contracts.slices import renumber
from cl_bench.contracts.task import Batch, Data, Origin, Recovery, Task

__all__ = ["Batch", "Data", "Origin", "Pretraining", "Recovery", "Scenario", "Stream", "Task"]

Scenario = Literal["domain", "task", "class"]
"""van de Ven & Tolias (2019): same labels and one head (``domain``), a head per task with the task
id known at test time (``task``), one growing head without it (``class``)."""


@checked("stream.pretrain.")
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
    steps: Index
    learning_rate: Rate = 1e-3
    final_rate: Share = 0.1
    warmup: Index = 0
    weight_decay: Strength = 0.1
    eps: Rate = 1e-6

    def rate(self, step: int) -> float:
        """Share of the highest rate that step ``step`` (from 0) takes."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.final_rate + (1 - self.final_rate) * (1 + math.cos(math.pi * done)) / 2


class Stream(Sequence[Task]):
    """A sequence of tasks: ``len``, index, slice, iterate.

    A slice is a stream that can be run: its tasks, heads and classes are counted from 0. What comes
    before the first task, if anything, comes before a slice too. ``stream.tasks[1:]`` are the tasks
    as they stand in the whole stream.

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
        facts: further plain values for the record, such as the backbone that makes its inputs.
        input_dtype: of ``x``.
        remarks: what the user should know of the data, said where a run begins.
    """

    pretraining: Pretraining | None = None
    facts: Mapping[str, Any] = MappingProxyType({})
    remarks: Sequence[str] = ()
    input_dtype: torch.dtype = torch.float32

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """The options of every stream are checked against their annotations."""
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            checked("stream.")(cls)

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
        kinds = [task.kind for task in tasks]
        if kinds != sorted(kinds, reverse=True) or kinds[0] == "forget":
            raise UsageError(
                f"stream {name!r}: requests to forget come after all tasks, got {kinds}"
            )
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

    def state_dict(self) -> dict[str, Any]:
        """What of its data came about while it was learned; for checkpoints. Mostly nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""

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
        tasks = renumber(self.tasks[index], self.task_id_at_test)
        if not tasks:
            raise UsageError(f"stream {self.name!r} has {len(self)} tasks, none of them in {index}")
        part = copy.copy(self)
        part.tasks = tuple(tasks)
        return part

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)
