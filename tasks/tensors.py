"""Streams made of your tensors: for data of your own, notebooks and tests."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from cl_bench.contracts.errors import UsageError
from cl_bench.contracts.stream import Data, Origin, Scenario, Stream, Task
from cl_bench.data import MemoryData

Split = tuple[Tensor, Tensor]
"""``x`` float32 (n, *input_shape) and ``y`` int64 (n,), positions of classes."""

GIVEN = Origin(source="tensors given in Python", licence="not stated", citation="none")

SPLITS = ("train", "validation", "test")


class TensorTask(Task):
    """A task whose data are tensors.

    Args:
        index: position in the stream.
        train: training data.
        test: what the accuracy matrix is made from; None scores the training data, and the
            record's ``data.json`` says so.
        validation: for early stopping and search; None is none.
        name: unique within the stream; None for ``task_<index>``.
        classes: its positions in the stream's label space; None for those from 0 to the largest
            label of all its data.
        head: which output head serves it.
        metric: what its score is called.
        origin: licence, source, citation.
        task_id: whether batches say which task they are from.

    Raises:
        UsageError: a split is not of this form, or its ``x`` of another shape than ``train``'s.
    """

    def __init__(
        self,
        index: int,
        train: Split,
        *,
        test: Split | None = None,
        validation: Split | None = None,
        name: str | None = None,
        classes: range | None = None,
        head: int = 0,
        metric: str = "accuracy",
        origin: Origin = GIVEN,
        task_id: bool = True,
    ) -> None:
        self.index, self.head = index, head
        self.name = f"task_{index}" if name is None else name
        self.metric, self.origin = metric, origin
        require_split(train, f"task {self.name!r}, train")
        if not len(train[0]):
            raise UsageError(f"task {self.name!r}, train: there are no samples; give at least one")
        shape = train[0].shape[1:]
        for split, part in (("validation", validation), ("test", test)):
            if part is not None:
                require_split(part, f"task {self.name!r}, {split}", shape)
        given = [part for part in (train, validation, test) if part is not None]
        self.classes = range(_largest(y for _, y in given) + 1) if classes is None else classes
        empty = (train[0][:0], train[1][:0])
        self._train = self._data(train, task_id)
        self._validation = self._data(empty if validation is None else validation, task_id)
        self._test = self._train if test is None else self._data(test, task_id)
        if test is None:
            self.facts = {"scored_on": "training data"}

    def _data(self, split: Split, task_id: bool) -> MemoryData:
        x, y = split
        told = {"task": torch.full_like(y, self.index)} if task_id else {}
        return MemoryData({"x": x, "y": y, **told})

    @property
    def train(self) -> Data:
        """Training data."""
        return self._train

    @property
    def validation(self) -> Data:
        """Data for early stopping and search; may be empty."""
        return self._validation

    @property
    def test(self) -> Data:
        """What the accuracy matrix is made from."""
        return self._test


def from_tensors(
    tasks: Sequence[Split | Mapping[str, Split]],
    scenario: Scenario = "domain",
    *,
    labels: Literal["stream", "task"] = "stream",
    names: Sequence[str] | None = None,
    name: str = "tensors",
    metric: str = "accuracy",
    origin: Origin = GIVEN,
    task_id_at_test: bool | None = None,
) -> Stream:
    """A stream of tensors, one entry a task.

    Args:
        tasks: training data ``(x, y)``, or a mapping with ``train`` and, as far as there are any,
            ``validation`` and ``test``; ``x`` float32 (n, *input_shape), ``y`` int64 (n,).
        scenario: what is known at test time.
        labels: how ``y`` counts classes where each task has its own: through the ``stream``, each
            task's after those of the one before, or from 0 in every ``task``. In the scenario
            ``domain`` all tasks share their classes, from 0.
        names: of the tasks, each another.
        name: of the stream.
        metric: what the tasks' score is called.
        origin: licence, source, citation.
        task_id_at_test: None leaves it to the scenario.

    Raises:
        UsageError: what was given does not make such a stream.
    """
    if names is not None and len(names) != len(tasks):
        raise UsageError(f"names: {len(names)} for {len(tasks)} tasks; give one a task")
    called = [f"task_{i}" for i in range(len(tasks))] if names is None else list(names)
    splits = [_splits(part, f"task {n!r}") for part, n in zip(tasks, called, strict=True)]
    shapes = {tuple(part["train"][0].shape[1:]) for part in splits}
    if len(shapes) > 1:
        raise UsageError(f"tasks have inputs of shapes {sorted(shapes)}: give all one shape")
    told = scenario == "task" if task_id_at_test is None else task_id_at_test
    made: list[TensorTask] = []
    start, shared = 0, max((_largest(_labels(part)) for part in splits), default=-1) + 1
    for i, (part, task) in enumerate(zip(splits, called, strict=True)):
        own = scenario != "domain"
        if own and labels == "task":
            part = {split: (x, y + start) for split, (x, y) in part.items()}
        classes = range(start, _largest(_labels(part)) + 1) if own else range(shared)
        least = min(int(y.min()) for y in _labels(part) if len(y))
        if least < classes.start:
            raise UsageError(
                f"task {task!r}: label {least} comes before {classes.start}, its first; number "
                "each task's classes after those of the task before, or from 0 in every task and "
                'say labels="task"'
            )
        made.append(
            TensorTask(
                i,
                part["train"],
                test=part.get("test"),
                validation=part.get("validation"),
                name=task,
                classes=classes,
                head=i if own else 0,
                metric=metric,
                origin=origin,
                task_id=told,
            )
        )
        start = classes.stop if own else 0
    shape = next(iter(shapes), ())
    fingerprint = fingerprint_of(splits)
    return Stream(name, made, scenario, shape, fingerprint, task_id_at_test=task_id_at_test)


def require_split(split: object, where: str, shape: Sequence[int] | None = None) -> None:
    """Raise :class:`UsageError` if ``split`` is no :data:`Split`, or has not this input shape."""
    if not (
        isinstance(split, tuple | list) and len(split) == 2 and all(map(torch.is_tensor, split))
    ):
        raise UsageError(f"{where}: give a pair of tensors (x, y), not {type(split).__name__}")
    x, y = split
    if x.dtype != torch.float32 or x.dim() < 2:
        raise UsageError(
            f"{where}: x is {_shown(x)} and must be float32 of shape (n, ...); use x.float(), for "
            "images x.float() / 255"
        )
    if y.dtype != torch.int64 or y.shape != x.shape[:1]:
        raise UsageError(
            f"{where}: y is {_shown(y)} and must be int64 of shape {tuple(x.shape[:1])}, a label "
            "for every sample; use y.long().flatten()"
        )
    if shape is not None and tuple(x.shape[1:]) != tuple(shape):
        raise UsageError(
            f"{where}: x is {_shown(x)}, and samples of train have shape {tuple(shape)}; give all "
            "one shape"
        )


def fingerprint_of(tasks: Iterable[Mapping[str, Split]]) -> str:
    """SHA-256 of all numbers, with their shapes."""
    digest = hashlib.sha256()
    for parts in tasks:
        for split in SPLITS:
            for tensor in parts.get(split, ()):
                digest.update(f"{split}{tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _splits(given: Split | Mapping[str, Split], where: str) -> dict[str, Split]:
    parts = dict(given) if isinstance(given, Mapping) else {"train": given}
    unknown = [split for split in parts if split not in SPLITS]
    if unknown or "train" not in parts:
        raise UsageError(f"{where} has {', '.join(map(str, parts))}: give {', '.join(SPLITS)}")
    for split, part in parts.items():
        require_split(part, f"{where}, {split}")
    if not len(parts["train"][0]):
        raise UsageError(f"{where}, train: there are no samples; give at least one")
    return parts


def _labels(parts: Mapping[str, Split]) -> list[Tensor]:
    return [y for _, y in parts.values()]


def _largest(labels: Iterable[Tensor]) -> int:
    return max((int(y.max()) for y in labels if len(y)), default=-1)


def _shown(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
