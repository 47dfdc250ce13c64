"""Permuted digits: the embedded stand-in for PMNIST."""

from cl_bench.contracts.options import PartShare
from cl_bench.contracts.stream import Stream
from cl_bench.tasks.arguments import HeldOut, OrderSeed, Permutations
from cl_bench.tasks.digits import load_digits
from cl_bench.tasks.images.arrange import Holdout, permuted_tasks


class PermutedDigits(Stream):
    """scikit-learn's 8x8 digits, each task with a pixel permutation of its own; one shared head.

    Args:
        num_tasks: from 1 to 100.
        order_seed: chooses the permutations, by PMNIST's rule (``pixel_orders``).
        identity_first: leave the first task's pixels where they are.
        validation_fraction: share of the training data held out.
        validation_split: hold out the ``first`` or ``random`` rows.
        task_id_at_test: let strategies know the task at test time (TRGP needs it); recorded with
            every score, and never compared with scores reached without it. None is no; from the
            command line None lets the strategies know that need it.

    Raises:
        UsageError: if an argument is out of range.
    """

    def __init__(
        self,
        num_tasks: Permutations = 10,
        order_seed: OrderSeed = 0,
        identity_first: bool = False,
        validation_fraction: PartShare = 0.1,
        validation_split: HeldOut = "random",
        task_id_at_test: bool | None = None,
    ) -> None:
        holdout = Holdout(validation_fraction, validation_split, order_seed)
        source = load_digits()
        tasks = permuted_tasks(
            source, num_tasks, order_seed, holdout, identity_first, bool(task_id_at_test)
        )
        super().__init__(
            "permuted_digits",
            tasks,
            "domain",
            source.shape,
            source.fingerprint,
            task_id_at_test=task_id_at_test,
        )
