"""Tasks: what a learner is given to learn at a time, and the form of its data."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from cl_bench.contracts.randomness import generator

Batch = dict[str, Tensor]
"""One batch: named tensors whose first dimension counts samples.

Vision streams use ``x`` float32 (n, *input_shape), ``y`` int64 (n,) the position of the class in
the stream's label space and, where the task id is known at test time, ``task`` int64 (n,) the
task's index; a few samples of every task are checked before a run starts. What
language streams use stands in :mod:`cl_bench.contracts.language`.
"""


def batch_sizes(count: int, size: int, least: int = 1) -> list[int]:
    """Samples of every batch that ``count`` samples make, in order.

    Each has ``size``, the last one what is left; if that is fewer than ``least``, it joins the
    batch before it, where there is one.
    """
    sizes = [size] * (count // size) + [count % size] * (count % size > 0)
    if len(sizes) > 1 and sizes[-1] < least and size >= least:
        sizes[-2:] = [sizes[-2] + sizes[-1]]
    return sizes


def split_batch(batch: Batch, size: int, least: int = 1) -> Iterator[Batch]:
    """A batch in batches of :func:`batch_sizes`."""
    sizes = batch_sizes(len(next(iter(batch.values()))), size, least)
    for values in zip(*(torch.split(v, sizes) for v in batch.values()), strict=True):
        yield dict(zip(batch, values, strict=True))


AT_ONCE = 1 << 28
"""Numbers that the gradients of single samples may have together (1 GiB in float32)."""


def held_at_once(weights: int, most: int) -> int:
    """Samples, at most ``most``, of whose single gradients of so many weights each is held."""
    return max(1, min(most, AT_ONCE // max(weights, 1)))


@runtime_checkable
class Data(Protocol):
    """Samples that are fetched many at a time: ``data[LongTensor] -> Batch``.

    Data that also has ``lengths``, a number for every sample, is evaluated in that order. Data that
    training sees changed at random also has ``augmented(seed) -> Data | None``: the samples as an
    epoch of that seed sees them, with ``x`` as it is under ``plain``, and ``likewise(data)``, which
    gives other samples that are changed in the same way.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor) -> Batch: ...


def augmented(data: Data, seed: int) -> Data | None:
    """``data`` as an epoch of training sees it; None if that is as it is."""
    make = getattr(data, "augmented", None)
    found: Data | None = None if make is None else make(seed)
    return found


def likewise(data: Data, others: Data) -> Data:
    """``others``, changed at random in training just as ``data`` is; as they are if it is not."""
    make = getattr(data, "likewise", None)
    found: Data = others if make is None else make(others)
    return found


Side = Literal["train", "validation", "test"]


class Samples(Protocol):
    """All that a corpus holds on one side, as it is stored: before a stream makes inputs of it.

    ``samples[index]`` gives images as float32 (n, channels, height, width) in [0, 1], and texts as
    a list of n strings.
    """

    @property
    def kind(self) -> Literal["image", "text"]:
        """Which of the two."""

    @property
    def identity(self) -> str:
        """Names content and order; the same in every stream of the same data."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor) -> Any: ...


@dataclass(frozen=True)
class Stored:
    """Data of a task as rows of what is stored, which tasks and streams share.

    Attributes:
        samples: all of them.
        rows: int64 (n,), which are the task's.
        labels: what a batch of all n holds beside its input: ``y`` and perhaps ``task``.
        augmented: whether training sees them changed at random.
    """

    samples: Samples
    rows: Tensor
    labels: Batch
    augmented: bool = False


@dataclass(frozen=True)
class Origin:
    """Where data comes from: printed in the record, in model cards and by ``cl-bench``."""

    source: str
    licence: str
    citation: str
    generated: bool = False  # by a program alone: nobody else's data is in it


@dataclass(frozen=True)
class Recovery:
    """Two disjoint halves of a task, neither of which tells anything about the other's answers.

    Learning ``train`` anew can then bring back how the task is done, but not what was known of
    ``test``.

    Attributes:
        train: the half that is learned anew.
        test: the half that is scored.
        control: samples of the same kind that no learner ever saw: they must stay at chance.
        chance: what knowing nothing but the frequencies of answers scores on the control.
    """

    train: Data
    test: Data
    control: Data | None = None
    chance: float | None = None


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
        ordered: whether training samples stand in the order of time, as a stream of data has them.
        kind: ``learn``, or ``forget``: a request that what ``train`` holds be known no longer.
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
    ordered: bool = False
    kind: Literal["learn", "forget"] = "learn"
    recovery: Recovery | None = None
    facts: Mapping[str, Any] = MappingProxyType({})
    origin: Origin

    @property
    @abstractmethod
    def train(self) -> Data:
        """Training data. Held only while somebody uses it: streams need not fit in memory.

        By index, samples as they are: only the training loop sees them augmented, if they are.
        """

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

    def stored(self, side: Side) -> Stored | None:
        """The data of a side as it is stored; None where the stream does not tell."""
        return None

    def prepare(self, answer: Callable[[Batch], Tensor]) -> Mapping[str, float] | None:
        """Before the task is planned: what of its data depends on the model as it is now.

        Called again with the same weights where a run is resumed inside the task.

        Args:
            answer: the model's outputs for a batch, as at test.

        Returns:
            What the record is told of it, under the probe ``labels``; None tells nothing.
        """
        return None

    def sample(self, n: int, seed: int) -> Batch:
        """``n`` training samples (fewer if the task has fewer), uniform, without replacement."""
        data = self.train
        order = torch.randperm(len(data), generator=generator(seed, "sample", self.index))
        return data[order[:n]]
