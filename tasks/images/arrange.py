"""Arranging one image source into tasks: permuted, rotated or split by class."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cl_bench.contracts.errors import UsageError
from cl_bench.contracts.randomness import generator
from cl_bench.contracts.stream import Scenario
from cl_bench.tasks.arguments import Angles, ClassOrder, Order, Rows, require
from cl_bench.tasks.images.increments import first_of_each, increments, ordered
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
    """Which rows of a task there are, and which of them become its validation data.

    Attributes:
        fraction: share of the rows, in [0, 1), rounded down.
        split: the ``first`` rows (GPM's and HAT's protocol) or ``random`` ones.
        seed: of the random choice; a stream passes its ``order_seed``.
        train_per_class: the first so many training rows of every class, of which validation data
            is taken; None for all.
        test_per_class: the first so many test rows of every class; None for all.
    """

    fraction: float
    split: Rows
    seed: int
    train_per_class: int | None = None
    test_per_class: int | None = None

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
    angles: Angles = "even",
) -> list[ImageTask]:
    """Tasks rotated by angles below ``max_angle``.

    Args:
        source: the images.
        num_tasks: how many angles, from 1 to 360.
        order_seed: orders the angles if ``angle_order`` is ``random``, or draws them.
        holdout: the validation rule.
        max_angle: in (0, 360], itself not reached.
        angle_order: ``fixed`` (growing) or ``random``.
        angles: ``even``, ``i * max_angle / num_tasks`` degrees for i = 0 .. num_tasks - 1; or
            ``uniform``, drawn from [0, max_angle), which have no other order.

    Raises:
        UsageError: if an argument is out of range.
    """
    if angles == "uniform":
        drawn = torch.rand(
            num_tasks, generator=generator(order_seed, "angles"), dtype=torch.float64
        )
        degrees = (max_angle * drawn).tolist()
    else:
        order = ordered(num_tasks, "angle_order", angle_order, order_seed)
        degrees = [i * max_angle / num_tasks for i in order]
    names = [f"rot_{angle:g}" for angle in degrees]
    return _domain_tasks(source, names, [Rotation(angle) for angle in degrees], holdout)


def split_tasks(
    source: ImageSource,
    num_tasks: int | None,
    classes_per_task: int | None,
    order_seed: int,
    holdout: Holdout,
    scenario: Scenario,
    class_order: ClassOrder,
    first_classes: int | None = None,
    classes: Sequence[int] | None = None,
    arrange: Arrangement | None = None,
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
        class_order: ``fixed`` (as in the data set), ``random`` or ``seed_1993``.
        first_classes: of the first task, where it has more (or fewer) than the others.
        classes: the data set's labels that there are tasks of; None for all.
        arrange: what is done to the pixels of all tasks before they are normalised; None for
            nothing.

    Raises:
        UsageError: if the classes cannot be divided like that.
    """
    labels = list(range(source.num_classes)) if classes is None else list(classes)
    sizes = increments(len(labels), num_tasks, classes_per_task, first_classes)
    if 1 in sizes:
        remedy = "one class a task leaves nothing to decide there; use fewer tasks or class"
        require(scenario == "class", "scenario", scenario, remedy)
    if len(set(sizes)) > 1:
        remedy = f"domain has one head for all, and tasks have {sizes} classes; use class or task"
        require(scenario != "domain", "scenario", scenario, remedy)
    order = [labels[i] for i in ordered(len(labels), "class_order", class_order, order_seed)]
    stops = list(itertools.accumulate(sizes))
    groups = [order[stop - size : stop] for size, stop in zip(sizes, stops, strict=True)]
    done = arrange or Unchanged()
    parts = [Part(_split_name(i, group), source, group, done) for i, group in enumerate(groups)]
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
    all_rows = first_of_each(train_y, holdout.train_per_class)
    test_rows = first_of_each(test_y, holdout.test_per_class)
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


def _split_name(index: int, labels: list[int]) -> str:
    first, last = labels[0], labels[-1]
    if labels == [first]:
        return f"class_{first}"
    return f"classes_{first}-{last}" if labels == list(range(first, last + 1)) else f"split_{index}"


def _legacy_shuffle(count: int, seed: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    order = np.arange(count, dtype=np.int64)
    np.random.RandomState(seed).shuffle(order)
    return order
