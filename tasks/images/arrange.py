"""Arranging one image source into tasks: permuted, rotated or split by class."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cl_bench.contracts.errors import UsageError
from cl_bench.contracts.randomness import generator
from cl_bench.contracts.stream import Scenario
from cl_bench.tasks.arguments import Order, Rows, require
from cl_bench.tasks.images.source import ImageSource
from cl_bench.tasks.images.task import ImageData, ImageTask
from cl_bench.tasks.images.views import Arrangement, Permutation, Rotation, Unchanged, View, view_of


@dataclass(frozen=True)
class Part:
    """Some classes of a data set: what one task of a stream with classes of its own is made of.

    Attributes:
        name: of the task.
        source: the images.
        labels: the data set's labels, in the order of their positions in the label space.
        arrange: what is done to the pixels before they are normalised.
    """

    name: str
    source: ImageSource
    labels: list[int]
    arrange: Arrangement = field(default_factory=Unchanged)


@dataclass(frozen=True)
class Holdout:
    """Which training rows of a task become its validation data.

    Attributes:
        fraction: share of the rows, in [0, 1), rounded down.
        split: the ``first`` rows (GPM's and HAT's protocol) or ``random`` ones.
        seed: of the random choice; a stream passes its ``order_seed``.
    """

    fraction: float
    split: Rows
    seed: int

    def carve(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """``rows`` (n,) as (training, validation), each in the order of ``rows``."""
        count = int(self.fraction * len(rows))
        held = torch.zeros(len(rows), dtype=torch.bool)
        if self.split == "first":
            held[:count] = True
        else:
            # Not keyed by the task: streams that show the same rows again hold the same ones out.
            order = torch.randperm(len(rows), generator=generator(self.seed, "validation"))
            held[order[:count]] = True
        return rows[~held], rows[held]


def pixel_orders(pixels: int, num_tasks: int, order_seed: int) -> list[Tensor]:
    """The permutations of GPM's and HAT's PMNIST code: int64 (pixels,), one a task.

    Slot i takes r_i = shuffle(range(10), random_state=order_seed)[i] and permutes with
    shuffle(arange(pixels), random_state=r_i * 100 + i), ``shuffle`` being scikit-learn's, which is
    numpy's legacy generator shuffling the indices. More than ten tasks shuffle as many numbers.
    Source: github.com/sahagobinda/GPM @ 1a238ec, dataloader/pmnist.py.
    """
    slots = _legacy_shuffle(max(10, num_tasks), order_seed)[:num_tasks]
    return [
        torch.from_numpy(_legacy_shuffle(pixels, int(r) * 100 + i)) for i, r in enumerate(slots)
    ]


def permuted_tasks(
    source: ImageSource,
    num_tasks: int,
    order_seed: int,
    holdout: Holdout,
    identity_first: bool,
    task_id: bool = False,
) -> list[ImageTask]:
    """Tasks that each see the pixels in an order of their own (:func:`pixel_orders`).

    With ``task_id`` every batch says which task it is from.

    At most 100 tasks have distinct seeds for their slots.
    """
    orders = pixel_orders(source.shape[1] * source.shape[2], num_tasks, order_seed)
    arrangements: list[Arrangement] = [Permutation(order) for order in orders]
    if identity_first:
        arrangements[0] = Unchanged()
    names = [f"perm_{i}" for i in range(num_tasks)]
    return _domain_tasks(source, names, arrangements, holdout, task_id)


def rotated_tasks(
    source: ImageSource,
    num_tasks: int,
    order_seed: int,
    holdout: Holdout,
    max_angle: float,
    angle_order: Order,
) -> list[ImageTask]:
    """Tasks rotated by ``i * max_angle / num_tasks`` degrees, i = 0 .. num_tasks - 1.

    Args:
        source: the images.
        num_tasks: how many angles, from 1 to 360.
        order_seed: orders the angles if ``angle_order`` is ``random``.
        holdout: the validation rule.
        max_angle: in (0, 360], itself not reached.
        angle_order: ``fixed`` (growing) or ``random``.

    Raises:
        UsageError: if an argument is out of range.
    """
    angles = [i * max_angle / num_tasks for i in range(num_tasks)]
    angles = [angles[i] for i in ordered(num_tasks, "angle_order", angle_order, order_seed)]
    names = [f"rot_{angle:g}" for angle in angles]
    return _domain_tasks(source, names, [Rotation(angle) for angle in angles], holdout)


def split_tasks(
    source: ImageSource,
    num_tasks: int | None,
    classes_per_task: int | None,
    order_seed: int,
    holdout: Holdout,
    scenario: Scenario,
    class_order: Order,
) -> list[ImageTask]:
    """Tasks with classes of their own.

    Args:
        source: the images.
        num_tasks: how many; None for as many as the classes make.
        classes_per_task: how many classes each; None to divide all classes evenly. If both are
            given the stream may leave classes out.
        order_seed: orders the classes if ``class_order`` is ``random``.
        holdout: the validation rule, applied within each task.
        scenario: ``task`` and ``class`` give task i the positions [i k, (i + 1) k) and head i;
            ``domain`` numbers every task's classes from 0 on one head.
        class_order: ``fixed`` (as in the data set) or ``random``.

    Raises:
        UsageError: if the classes cannot be divided like that.
    """
    num_tasks, size = _divide(source.num_classes, num_tasks, classes_per_task)
    if size == 1:
        remedy = "one class a task leaves nothing to decide there; use fewer tasks or class"
        require(scenario == "class", "scenario", scenario, remedy)
    order = ordered(source.num_classes, "class_order", class_order, order_seed)
    groups = [order[i * size : (i + 1) * size] for i in range(num_tasks)]
    parts = [Part(_split_name(i, labels), source, labels) for i, labels in enumerate(groups)]
    return class_tasks(parts, scenario, holdout)


def class_tasks(parts: Sequence[Part], scenario: Scenario, holdout: Holdout) -> list[ImageTask]:
    """One task a part, each with classes of its own.

    Args:
        parts: in the order in which they are learned.
        scenario: ``task`` and ``class`` number the classes of all parts one after another and give
            task i head i; ``domain`` numbers every task's classes from 0 on one head.
        holdout: the validation rule, applied within each task.

    Raises:
        UsageError: a class has no training or no test samples.
    """
    tasks: list[ImageTask] = []
    start = 0
    for i, part in enumerate(parts):
        tasks.append(
            _task(
                part.source,
                name=part.name,
                index=i,
                head=0 if scenario == "domain" else i,
                classes=range(start, start + len(part.labels)),
                labels=part.labels,
                view=view_of(part.source, part.arrange),
                holdout=holdout,
                task_id=scenario == "task",
            )
        )
        if scenario != "domain":
            start += len(part.labels)
    return tasks


def _domain_tasks(
    source: ImageSource,
    names: list[str],
    arrangements: Sequence[Arrangement],
    holdout: Holdout,
    task_id: bool = False,
) -> list[ImageTask]:
    return [
        _task(
            source,
            name=name,
            index=i,
            head=0,
            classes=range(source.num_classes),
            labels=list(range(source.num_classes)),
            view=view_of(source, arrange),
            holdout=holdout,
            task_id=task_id,
        )
        for i, (name, arrange) in enumerate(zip(names, arrangements, strict=True))
    ]


def _task(
    source: ImageSource,
    *,
    name: str,
    index: int,
    head: int,
    classes: range,
    labels: list[int],
    view: View,
    holdout: Holdout,
    task_id: bool,
) -> ImageTask:
    position = torch.full((source.num_classes,), -1)
    position[labels] = torch.tensor(classes)
    train_y, test_y = position[source.train_labels], position[source.test_labels]
    all_rows, test_rows = (torch.nonzero(y >= 0).flatten() for y in (train_y, test_y))
    train_rows, validation_rows = holdout.carve(all_rows)
    for y, rows, remedy in (
        (train_y, all_rows, "training samples: check the data, or leave the class out"),
        (
            train_y,
            train_rows,
            f"training samples besides validation: use stream.validation_split=random or less "
            f"than stream.validation_fraction={holdout.fraction}",
        ),
        (test_y, test_rows, "test samples: check the data and stream.test_split"),
    ):
        empty = [c for c in labels if not bool((y[rows] == position[c]).any())]
        if empty:
            raise UsageError(f"task {name!r}: classes {empty} have no {remedy}")

    def data(side: Literal["train", "test"], rows: Tensor, y: Tensor) -> ImageData:
        pixels = source.train if side == "train" else source.test
        name = f"{source.fingerprint} {side}"
        return ImageData(pixels, rows, y[rows], view, index if task_id else None, name)

    return ImageTask(
        name=name,
        index=index,
        head=head,
        classes=classes,
        labels=labels,
        class_names=[source.class_names[label] for label in labels] if source.class_names else (),
        origin=source.origin,
        train=data("train", train_rows, train_y),
        validation=data("train", validation_rows, train_y),
        test=data("test", test_rows, test_y),
        in_memory=source.in_memory,
    )


def _divide(
    num_classes: int, num_tasks: int | None, classes_per_task: int | None
) -> tuple[int, int]:
    """(number of tasks, classes a task)."""
    have = f"the data set has {num_classes} classes"
    if num_tasks is None and classes_per_task is None:
        raise UsageError(
            f"stream.num_tasks=null: {have}; set stream.num_tasks or stream.classes_per_task"
        )
    if classes_per_task is not None:
        remedy = f"{have}; choose from 1 to {num_classes}"
        require(1 <= classes_per_task <= num_classes, "classes_per_task", classes_per_task, remedy)
    if num_tasks is None:
        assert classes_per_task is not None
        remedy = f"{have}; choose a divisor, or set stream.num_tasks too to leave classes out"
        divides = num_classes % classes_per_task == 0
        require(divides, "classes_per_task", classes_per_task, remedy)
        return num_classes // classes_per_task, classes_per_task
    if classes_per_task is None:
        remedy = f"{have}; choose a divisor, or set stream.classes_per_task to leave classes out"
        require(num_classes % num_tasks == 0, "num_tasks", num_tasks, remedy)
        return num_tasks, num_classes // num_tasks
    remedy = f"{have}, too few for {classes_per_task} a task; lower it or stream.classes_per_task"
    require(num_tasks * classes_per_task <= num_classes, "num_tasks", num_tasks, remedy)
    return num_tasks, classes_per_task


def ordered(count: int, key: str, how: Order, order_seed: int) -> list[int]:
    """``range(count)``, ``fixed`` or in the ``random`` order that ``order_seed`` gives ``key``."""
    if how == "fixed":
        return list(range(count))
    order: list[int] = torch.randperm(count, generator=generator(order_seed, key)).tolist()
    return order


def _split_name(index: int, labels: list[int]) -> str:
    first, last = labels[0], labels[-1]
    if labels == [first]:
        return f"class_{first}"
    return f"classes_{first}-{last}" if labels == list(range(first, last + 1)) else f"split_{index}"


def _legacy_shuffle(count: int, seed: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    order = np.arange(count, dtype=np.int64)
    np.random.RandomState(seed).shuffle(order)
    return order
