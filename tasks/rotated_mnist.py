"""Rotated MNIST."""

from typing import Annotated

from cl_bench.contracts.options import OnlyWith, PartShare, Rate, Share
from cl_bench.contracts.stream import Stream
from cl_bench.tasks.arguments import Angle, Angles, HeldOut, Order, Rotations, RotationSeed
from cl_bench.tasks.images.arrange import Holdout, rotated_tasks
from cl_bench.tasks.images.source import Moments
from cl_bench.tasks.mnist import MOMENTS, load_mnist


class RotatedMNIST(Stream):
    """MNIST, every task turned by an angle of its own; one shared head.

    Args:
        num_tasks: from 1 to 360.
        max_angle: in (0, 360] degrees, itself not reached.
        angles: ``even``, i * max_angle / num_tasks degrees for task i, or ``uniform``, drawn from
            [0, max_angle).
        angle_order: of even ones, ``fixed`` (growing) or ``random``.
        order_seed: of angles that are drawn, their random order and a random validation split.
        validation_fraction: share of the training data held out.
        validation_split: hold out the ``first`` or ``random`` rows.
        mean: of the pixels, which count from 0 to 1; inputs are (x - mean) / std.
        std: as ``mean``.
        data_dir: folder with MNIST (see ``load_mnist``); None for the hub.

    Raises:
        UsageError: if an argument is out of range or the data is missing.
    """

    def __init__(
        self,
        num_tasks: Rotations = 10,
        max_angle: Angle = 180.0,
        angles: Angles = "even",
        angle_order: Annotated[Order, OnlyWith("angles", ("even",))] = "fixed",
        order_seed: Annotated[RotationSeed, OnlyWith("angles", ("uniform",))] = 0,
        validation_fraction: PartShare = 0.1,
        validation_split: HeldOut = "first",
        mean: Share = MOMENTS.mean[0],
        std: Rate = MOMENTS.std[0],
        data_dir: str | None = None,
    ) -> None:
        holdout = Holdout(validation_fraction, validation_split, order_seed)
        source = load_mnist(data_dir, "rotated_digits", Moments((mean,), (std,)))
        tasks = rotated_tasks(
            source, num_tasks, order_seed, holdout, max_angle, angle_order, angles
        )
        super().__init__("rotated_mnist", tasks, "domain", source.shape, source.fingerprint)
