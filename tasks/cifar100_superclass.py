"""CIFAR-100 by superclass: 20 tasks of five related classes."""

from dataclasses import replace
from typing import Annotated

from torch import Tensor

from cl_bench.contracts.options import PartShare, Range
from cl_bench.contracts.stream import Scenario, Stream
from cl_bench.tasks.arguments import HeldOut, OrderSeed
from cl_bench.tasks.cifar100 import load_cifar100
from cl_bench.tasks.images.arrange import Holdout, Part, class_tasks
from cl_bench.tasks.images.increments import ordered
from cl_bench.tasks.images.source import Moments
from cl_bench.tasks.images.views import Unchanged

SUPERCLASSES = (
    ("aquatic_mammals", (4, 30, 55, 72, 95)),
    ("fish", (1, 32, 67, 73, 91)),
    ("flowers", (54, 62, 70, 82, 92)),
    ("food_containers", (9, 10, 16, 28, 61)),
    ("fruit_and_vegetables", (0, 51, 53, 57, 83)),
    ("household_electrical_devices", (22, 39, 40, 86, 87)),
    ("household_furniture", (5, 20, 25, 84, 94)),
    ("insects", (6, 7, 14, 18, 24)),
    ("large_carnivores", (3, 42, 43, 88, 97)),
    ("large_man-made_outdoor_things", (12, 17, 37, 68, 76)),
    ("large_natural_outdoor_scenes", (23, 33, 49, 60, 71)),
    ("large_omnivores_and_herbivores", (15, 19, 21, 31, 38)),
    ("medium_mammals", (34, 63, 64, 66, 75)),
    ("non-insect_invertebrates", (26, 45, 77, 79, 99)),
    ("people", (2, 11, 35, 46, 98)),
    ("reptiles", (27, 29, 44, 78, 93)),
    ("small_mammals", (36, 50, 65, 74, 80)),
    ("trees", (47, 52, 56, 59, 96)),
    ("vehicles_1", (8, 13, 48, 58, 90)),
    ("vehicles_2", (41, 69, 81, 85, 89)),
)
"""Krizhevsky's 20 superclasses: name, labels of its classes."""

TASK_ORDERS = (
    (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19),
    (15, 12, 5, 9, 7, 16, 18, 17, 1, 0, 3, 8, 11, 14, 10, 6, 2, 4, 13, 19),
    (17, 1, 19, 18, 12, 7, 6, 0, 11, 15, 10, 5, 13, 3, 9, 16, 4, 14, 2, 8),
    (11, 9, 6, 5, 12, 4, 0, 10, 13, 7, 14, 3, 15, 16, 8, 1, 2, 19, 18, 17),
    (6, 14, 0, 11, 12, 17, 13, 4, 9, 1, 7, 19, 8, 10, 3, 15, 18, 5, 2, 16),
)
"""The five orders of Yoon et al. (ICLR 2020) that published results are averaged over."""

UNNORMALISED = Moments((0.0,), (1.0,))


class Misread:
    """What the authors' code makes of an image: its 3 x 32 x 32 bytes taken for 32 x 32 x 3."""

    identity = "misread"

    def __call__(self, pixels: Tensor) -> Tensor:
        """(n, c, h, w) of any type."""
        count, channels, height, width = pixels.shape
        return pixels.reshape(count, height, width, channels).permute(0, 3, 1, 2)


class CIFAR100Superclass(Stream):
    """CIFAR-100, the five classes of one superclass a task; pixels from 0 to 1, not normalised.

    Source: github.com/sahagobinda/GPM @ dc5ba5c, dataloader/cifar100_superclass.py and
    main_cifar_superclass.py.

    Args:
        num_tasks: the first so many of the order, from 1 to 20.
        scenario: ``task`` (a head each, task id known), ``class`` (a head each, unknown) or
            ``domain`` (one head, every task's classes numbered from 0).
        task_order: which of the five published orders (0 ... 4); None for a random one.
        order_seed: of the random order and of a random validation split.
        validation_fraction: share of each task's training data held out.
        validation_split: hold out the ``first`` or ``random`` rows of each task.
        official_quirks: give the network what the authors' code gives it, which reshapes the bytes
            of an image in the wrong order: each becomes a grid of nine small, nearly grey copies.
            Only for comparison with published numbers.
        data_dir: folder with CIFAR-100 (see ``load_cifar100``); None for the hub.

    Raises:
        UsageError: if an argument is out of range or the data is missing.
    """

    def __init__(
        self,
        num_tasks: Annotated[int, Range(least=1, most=20)] = 20,
        scenario: Scenario = "task",
        task_order: Annotated[int, Range(least=0, most=4)] | None = 0,
        order_seed: OrderSeed = 0,
        validation_fraction: PartShare = 0.05,
        validation_split: HeldOut = "random",
        official_quirks: bool = False,
        data_dir: str | None = None,
    ) -> None:
        holdout = Holdout(validation_fraction, validation_split, order_seed)
        if task_order is None:
            order = ordered(len(SUPERCLASSES), "task_order", "random", order_seed)
        else:
            order = list(TASK_ORDERS[task_order])
        source = replace(load_cifar100(data_dir), moments=UNNORMALISED)
        arrange = Misread() if official_quirks else Unchanged()
        parts = [
            Part(name, source, list(labels), arrange)
            for name, labels in (SUPERCLASSES[i] for i in order[:num_tasks])
        ]
        super().__init__(
            "cifar100_superclass",
            class_tasks(parts, scenario, holdout),
            scenario,
            source.shape,
            source.fingerprint,
        )
