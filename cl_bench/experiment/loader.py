"""Batches of a task, in an order that depends on (seed, task, epoch) alone."""

from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cl_bench.contracts import (
    Batch,
    Data,
    Needs,
    Task,
    UsageError,
    augmented,
    batch_sizes,
    derive_seed,
    generator,
)
from cl_bench.experiment.token_batches import TokenBatches
from cl_bench.packed import Packs

NOTHING = Needs()


class TrainLoader:
    """Batches of one task, epoch after epoch.

    Attributes:
        packs: what an epoch hands out.

    Args:
        data: fetched many samples at a time.
        batch_size: samples of a batch; the last of an epoch may differ.
        seed: with ``task`` and the epoch, decides the order.
        task: index of the task.
        pack: most batches of one item; see :class:`~cl_bench.packed.Packs`.
        num_workers: processes that fetch ahead, for data that is decoded on the way.
        least: samples that a batch needs; a last one with fewer joins the batch before it.
        needs: what batches are to carry beside the data.
        tokens: tokens of every sample (n,) and the most that a batch may hold, in the place of
            ``batch_size``; None counts samples.
    """

    def __init__(
        self,
        data: Data,
        batch_size: int,
        seed: int,
        task: int,
        pack: int = 1,
        num_workers: int = 0,
        least: int = 1,
        needs: Needs = NOTHING,
        tokens: tuple[Tensor, int] | None = None,
    ) -> None:
        self.data = data
        self.seed = seed
        self.task = task
        self.num_workers = num_workers
        self.needs = needs
        self.epoch = 0
        self._skip = 0
        self.packs = (
            Packs(len(data), batch_size, pack, least) if tokens is None else TokenBatches(*tokens)
        )

    def resume_at(self, epoch: int, position: int) -> None:
        """Begin in ``epoch`` (from 0), after the first ``position`` items of it."""
        self.epoch, self._skip = epoch, position

    def __len__(self) -> int:
        return len(self.packs.bounds())

    def __iter__(self) -> Iterator[Batch]:
        order = torch.randperm(
            len(self.data), generator=generator(self.seed, "order", self.task, self.epoch)
        )
        seed = derive_seed(self.seed, "augment", self.task, self.epoch)
        shown = in_training(self.data, self.needs, seed)
        # A sized loader is never exhausted by Lightning: code after the last yield would not run.
        self.epoch += 1
        skip, self._skip = self._skip, 0
        indices = [order[start:end] for start, end in self.packs.bounds(order)[skip:]]
        rng = generator(self.seed, "workers", self.task, self.epoch)
        fetched = _fetch(shown, indices, self.num_workers, rng)
        for index, batch in zip(indices, fetched, strict=True):
            known = index if self.num_workers == 0 else None
            yield self.packs.handed_out(batch, self.data, known)


def in_training(data: Data, needs: Needs, seed: int) -> Data:
    """What an epoch trains on: augmented where the data is, with what the strategy needs beside.

    Args:
        data: of the task.
        needs: of the strategy.
        seed: of the epoch, for augmentation.
    """
    view = augmented(data, seed)
    if view is None and not (needs.sample_index or needs.plain_view):
        return data
    return _InTraining(data if view is None else view, needs, view is not None)


class _InTraining(Data):
    """Batches with ``index`` and ``plain``, as far as they are needed."""

    def __init__(self, data: Data, needs: Needs, augmented: bool) -> None:
        self.data = data
        self.needs = needs
        self.augmented = augmented

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Tensor) -> Batch:
        batch, more = dict(self.data[index]), {}
        plain = batch.pop("plain") if self.augmented else batch.get("x")
        if self.needs.plain_view and plain is not None:
            more["plain"] = plain
        if self.needs.sample_index:
            more["index"] = index
        for name in more:
            if name in batch:
                raise UsageError(
                    f"the stream's batches have a tensor {name!r} of their own, and the strategy "
                    "needs that name: call the stream's something else"
                )
        return batch | more


class EvalLoader:
    """Batches of evaluation data, each sample once.

    Data that knows the ``lengths`` of its samples is sorted by them, so that a batch is padded
    little. Where a sample's outputs depend on its batch, the order is drawn instead: data sets are
    often stored class by class, and a batch of one class is none that anybody meant.

    Args:
        data: what to evaluate on.
        batch_size: samples of a batch.
        max_samples: evaluate on a fixed random subset of this size; None means all.
        num_workers: processes that fetch ahead.
        part: which of how many parts of the data, for processes that evaluate together.
        mixed: seed and task from which the order is drawn; None leaves it to the data. No batch
            is then left with a lone sample.

    Raises:
        UsageError: there are more parts than samples.
    """

    def __init__(
        self,
        data: Data,
        batch_size: int,
        max_samples: int | None = None,
        num_workers: int = 0,
        part: tuple[int, int] = (0, 1),
        mixed: tuple[int, int] | None = None,
    ) -> None:
        self.data = data
        self.num_workers = num_workers
        index = torch.arange(len(data))
        if max_samples is not None and max_samples < len(data):
            index = torch.randperm(len(data), generator=generator(0, "evaluation"))[:max_samples]
            index = index.sort().values
        if 0 < len(index) < part[1]:
            raise UsageError(
                f"{part[1]} processes cannot share {len(index)} test samples: use fewer, or raise "
                "eval.max_samples"
            )
        lengths: Tensor | None = getattr(data, "lengths", None)
        if mixed is not None:
            index = index[
                torch.randperm(len(index), generator=generator(mixed[0], "mix", mixed[1]))
            ]
        elif lengths is not None:
            index = index[lengths[index].argsort(stable=True)]
        own = index[part[0] :: part[1]]
        sizes = batch_sizes(len(own), batch_size, 1 if mixed is None else 2)
        self.indices = list(torch.split(own, sizes))

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Batch]:
        return _fetch(self.data, self.indices, self.num_workers, generator(0, "evaluation"))


class _Indexed(torch.utils.data.Dataset[Batch]):
    """Lets DataLoader's workers fetch a whole batch by its indices."""

    def __init__(self, data: Data) -> None:
        self.data = data

    def __getitem__(self, index: Any) -> Batch:
        return self.data[index]


def _fetch(
    data: Data, indices: list[Tensor], num_workers: int, rng: torch.Generator
) -> Iterator[Batch]:
    if num_workers == 0:
        return (data[index] for index in indices)
    loader: DataLoader[Batch] = DataLoader(
        _Indexed(data),
        sampler=indices,
        batch_size=None,
        num_workers=num_workers,
        generator=rng,  # workers are seeded from it; without one, from training's random numbers
    )
    return iter(loader)


def require_samples(data: Sized, task: str, split: str) -> None:
    """Raise :class:`UsageError` if a task has nothing to learn from or to be tested on."""
    if len(data) == 0:
        raise UsageError(
            f"task {task!r} has no {split} samples: check the stream's data and its classes "
            "(stream.num_tasks=..., stream.data_dir=...)"
        )


def require_batch(data: Sized, task: str, phase: str | None, least: int) -> None:
    """Raise :class:`UsageError` if what a strategy trains on is less than a batch needs.

    Args:
        data: of its plan, or of a phase.
        task: its name.
        phase: its name; None is the task's own training.
        least: samples of a batch.
    """
    if len(data) < least:
        where = f"task {task!r}" + (f", phase {phase!r}" if phase is not None else "")
        why = ", as a layer normalises by the batch" if least > 1 else ""
        raise UsageError(
            f"{where}: the strategy trains on {len(data)} samples, and a batch needs {least}{why}: "
            "have it train on more of the task's data, or leave that out"
        )


def require_validation(task: Task) -> None:
    """Raise :class:`UsageError` if a task keeps no samples apart to decide on its rate."""
    if len(task.validation) == 0:
        raise UsageError(
            f"schedule=plateau: task {task.name!r} has no validation samples; keep some apart "
            "(stream.validation_fraction=0.05), or use schedule=constant"
        )


def require_labels(task: Task, drawn: Batch | None = None) -> None:
    """Raise :class:`UsageError` if labels lie outside the task's part of the label space.

    Args:
        task: whose classes the labels must be.
        drawn: samples to look at; None takes all where they lie in memory, else 1,000.
    """
    labels = drawn or getattr(task.train, "tensors", None) or task.sample(1000, 0)
    if "y" not in labels or not len(labels["y"]):
        return
    low, high = int(labels["y"].min()), int(labels["y"].max())
    if low < task.classes.start or high >= task.classes.stop:
        raise UsageError(
            f"task {task.name!r} has labels {low}..{high}, outside its head's classes "
            f"{task.classes.start}..{task.classes.stop - 1}: make the stream remap them to "
            "positions in its label space"
        )
