"""Which classes come when: sizes of tasks, orders of classes, rows of a class."""

import torch
from torch import Tensor

from cl_bench.contracts.errors import UsageError
from cl_bench.contracts.randomness import generator
from cl_bench.tasks.arguments import ClassOrder, require

# fmt: off
SEED_1993 = {
    100: (
        68, 56, 78, 8, 23, 84, 90, 65, 74, 76, 40, 89, 3, 92, 55, 9, 26, 80, 43, 38, 58, 70, 77, 1,
        85, 19, 17, 50, 28, 53, 13, 81, 45, 82, 6, 59, 83, 16, 15, 44, 91, 41, 72, 60, 79, 52, 20,
        10, 31, 54, 37, 95, 14, 71, 96, 98, 97, 2, 64, 66, 42, 22, 35, 86, 24, 34, 87, 21, 99, 0,
        88, 27, 18, 94, 11, 12, 47, 25, 30, 46, 62, 69, 36, 61, 7, 63, 75, 5, 32, 4, 51, 48, 73, 93,
        39, 67, 29, 49, 57, 33,
    ),
    200: (
        168, 136, 51, 9, 183, 101, 171, 99, 42, 159, 191, 70, 16, 188, 27, 10, 175, 26, 68, 187, 98,
        6, 85, 35, 112, 43, 100, 0, 103, 181, 88, 59, 4, 2, 116, 174, 94, 80, 106, 1, 147, 17, 141,
        131, 72, 23, 173, 54, 197, 118, 87, 32, 79, 104, 91, 19, 135, 107, 178, 36, 11, 199, 142, 8,
        122, 3, 28, 57, 153, 172, 190, 56, 49, 44, 97, 62, 151, 169, 194, 55, 192, 12, 189, 78, 66,
        180, 15, 137, 109, 134, 92, 119, 126, 52, 170, 40, 148, 65, 144, 64, 138, 45, 77, 89, 154,
        90, 71, 193, 74, 30, 113, 143, 96, 84, 67, 50, 186, 156, 69, 21, 18, 111, 108, 58, 125, 157,
        150, 110, 182, 129, 166, 83, 81, 60, 13, 165, 14, 176, 63, 117, 5, 22, 145, 121, 38, 41, 82,
        127, 114, 20, 31, 53, 37, 163, 196, 130, 152, 162, 86, 76, 24, 34, 184, 149, 33, 128, 198,
        155, 146, 167, 139, 120, 140, 102, 47, 25, 158, 123, 46, 164, 61, 7, 115, 75, 133, 160, 105,
        132, 179, 124, 48, 73, 93, 39, 95, 195, 29, 177, 185, 161,
    ),
}
# fmt: on
"""The orders of class-incremental papers since iCaRL: numpy's legacy permutation with seed 1993."""


def ordered(count: int, key: str, how: ClassOrder, order_seed: int) -> list[int]:
    """``range(count)`` in an order.

    Args:
        count: how many.
        key: of the option, which the random order depends on.
        how: ``fixed``; ``random``, by ``order_seed``; ``seed_1993``, of 100 or 200 classes.
        order_seed: of the random order.

    Raises:
        UsageError: no order of that name has so many.
    """
    if how == "fixed":
        return list(range(count))
    if how == "seed_1993":
        known = " and ".join(map(str, SEED_1993))
        require(count in SEED_1993, key, how, f"is kept for {known} classes, here are {count}")
        return list(SEED_1993[count])
    order: list[int] = torch.randperm(count, generator=generator(order_seed, key)).tolist()
    return order


def first_of_each(y: Tensor, limit: int | None) -> Tensor:
    """Rows of ``y`` int64 (n,) that are not negative: of each value the first ``limit``, or all.

    int64, rising.
    """
    rows = torch.nonzero(y >= 0).flatten()
    if limit is None:
        return rows
    by_class = rows[y[rows].argsort(stable=True)]
    counts = torch.bincount(y[rows])
    place = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[y[by_class]]
    return by_class[place < limit].sort().values


def increments(
    num_classes: int,
    num_tasks: int | None,
    classes_per_task: int | None,
    first_classes: int | None = None,
) -> list[int]:
    """How many classes each task has.

    Args:
        num_classes: in all.
        num_tasks: how many; None for as many as the classes make.
        classes_per_task: each, the first apart if ``first_classes`` is given; None to divide what
            is left evenly.
        first_classes: of the first task; None for as many as the others.

    Raises:
        UsageError: the classes cannot be divided like that.
    """
    if first_classes is None:
        have = f"the data set has {num_classes} classes"
        count, size = _divide(num_classes, num_tasks, classes_per_task, 0, have)
        return [size] * count
    remedy = f"the data set has {num_classes} classes; leave some for the tasks after the first"
    require(first_classes < num_classes, "first_classes", first_classes, remedy)
    if num_tasks is not None:
        remedy = "stream.first_classes is the first task's: there must be one more at least"
        require(num_tasks > 1, "num_tasks", num_tasks, remedy)
    rest = None if num_tasks is None else num_tasks - 1
    left = num_classes - first_classes
    have = f"after the first {first_classes} classes {left} are left"
    count, size = _divide(left, rest, classes_per_task, 1, have)
    return [first_classes, *[size] * count]


def _divide(
    num_classes: int, num_tasks: int | None, classes_per_task: int | None, before: int, have: str
) -> tuple[int, int]:
    """(number of tasks, classes a task), of those that come after ``before`` others."""
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
        require(num_classes % num_tasks == 0, "num_tasks", num_tasks + before, remedy)
        return num_tasks, num_classes // num_tasks
    remedy = f"{have}, too few for {classes_per_task} a task; lower it or stream.classes_per_task"
    fits = num_tasks * classes_per_task <= num_classes
    require(fits, "num_tasks", num_tasks + before, remedy)
    return num_tasks, classes_per_task
