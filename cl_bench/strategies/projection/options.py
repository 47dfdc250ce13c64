"""What strategies that protect layers have in common: options, and what they say of one layer."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, TypeVar

import torch

from cl_bench.contracts import (
    Batch,
    Learner,
    Protect,
    Strategy,
    Task,
    UsageError,
    batch_sizes,
    split_batch,
)
from cl_bench.contracts.options import Count, Range, SomeShare, shown

BATCH = 256
"""Samples whose layer inputs are in memory at once."""

N = TypeVar("N", int, float)

PerLayer = SomeShare | Sequence[SomeShare] | Mapping[str, SomeShare]
"""One share, one per protected layer in order, or ``{layer pattern: share}``."""
Samples = Count | Sequence[Count] | Mapping[str, Count]
"""The same for numbers of samples."""
Increment = Annotated[float, Range(above=-1, below=1)]
"""Added to a share once a task."""


class Protecting(Strategy):
    """Keeps what chosen layers do to old inputs.

    Args:
        protect: which layers, and what becomes of biases and normalisation.
    """

    def __init__(self, protect: Protect | None = None) -> None:
        self.protect = protect or Protect()

    def guarded(self, learner: Learner) -> frozenset[str]:
        """What ``protect`` says."""
        return learner.guarded(self.protect)


def training_batches(learner: Learner, task: Task, samples: int | None) -> Iterator[Batch]:
    """Batches of ``samples`` training samples of the task, drawn at random; of all, for None."""
    if samples is not None:
        sample = task.sample(samples, learner.seed)
        yield from split_batch(sample, BATCH, learner.least_batch)
        return
    data = task.train
    sizes = batch_sizes(len(data), BATCH, learner.least_batch)
    for index in torch.split(torch.arange(len(data)), sizes):
        yield data[index]


def threshold_of(
    value: float | Sequence[float] | Mapping[str, float],
    name: str,
    position: int,
    layers: int,
    increase: float = 0.0,
    key: str = "threshold",
) -> float:
    """The threshold of one layer: its entry in option ``key``, and at most 1 with the increase.

    Raises:
        UsageError: as :func:`per_layer`.
    """
    return min(1.0, max(0.0, per_layer(value, name, position, layers, key) + increase))


def per_layer(
    value: N | Sequence[N] | Mapping[str, N], name: str, position: int, layers: int, key: str
) -> N:
    """What option ``key`` says for one of ``layers`` layers.

    Raises:
        UsageError: a list of another length than there are layers, or no pattern matches.
    """
    if isinstance(value, Mapping):
        matching = [entry for pattern, entry in value.items() if fnmatchcase(name, pattern)]
        if not matching:
            raise UsageError(f"strategy.{key}={shown(value)}: no pattern matches layer {name!r}")
        return matching[0]
    if isinstance(value, Sequence):
        if len(value) != layers:
            raise UsageError(
                f"strategy.{key}={shown(value)} has {len(value)} entries, "
                f"but {layers} layers are protected"
            )
        return value[position]
    return value
