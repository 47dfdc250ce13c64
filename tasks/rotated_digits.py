"""Rotated digits: the embedded stand-in for rotated MNIST."""

from cl_bench.contracts.options import PartShare
from cl_bench.contracts.stream import Stream
from cl_bench.tasks.arguments import Angle, HeldOut, Order, Rotations, RotationSeed
from cl_bench.tasks.digits import load_digits
from cl_bench.tasks.images.arrange import Holdout, rotated_tasks


class RotatedDigits(Stream):
    """scikit-learn's 8x8 digits, task i turned by ``i * max_angle / num_tasks`` degrees; one head.

    Args:
        num_tasks: from 1 to 360.
        max_angle: in (0, 360] degrees, itself not reached.
        angle_order: ``fixed`` (growing) or ``random``.
        order_seed: of the random order of angles and of a random validation split.
        validation_fraction: share of the training data held out.
        validation_split: hold out the ``first`` or ``random`` rows.

    Raises:
        UsageError: if an argument is out of range.
    """

    def __init__(
        self,
        num_tasks: Rotations = 10,
        max_angle: Angle = 180.0,
        angle_order: Order = "fixed",
        order_seed: RotationSeed = 0,
        validation_fraction: PartShare = 0.1,
        validation_split: HeldOut = "random",
    ) -> None:
        holdout = Holdout(validation_fraction, validation_split, order_seed)
        source = load_digits()
        tasks = rotated_tasks(source, num_tasks, order_seed, holdout, max_angle, angle_order)
        super().__init__("rotated_digits", tasks, "domain", source.shape, source.fingerprint)
