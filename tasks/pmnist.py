"""Permuted MNIST as in the code of HAT and GPM."""

from cl_bench.contracts.options import PartShare
from cl_bench.contracts.stream import Stream
from cl_bench.tasks.arguments import HeldOut, OrderSeed, Permutations
from cl_bench.tasks.images.arrange import Holdout, permuted_tasks
from cl_bench.tasks.mnist import load_mnist


class PMNIST(Stream):
    """MNIST, each task (the first one too) with a pixel permutation of its own; one shared head.

    Source: github.com/sahagobinda/GPM @ 1a238ec, dataloader/pmnist.py. With the defaults, task i is
    their task i for ``seed=order_seed``: same permutations (``pixel_orders``), normalisation and
    validation data (the first 6000 training images).

    Args:
        num_tasks: from 1 to 100.
        order_seed: chooses the permutations.
        identity_first: leave the first task's pixels where they are.
        validation_fraction: share of the training data held out.
        validation_split: hold out the ``first`` or ``random`` rows.
        task_id_at_test: let strategies know the task at test time (TRGP needs it); recorded with
            every score, and never compared with scores reached without it. None is no; from the
            command line None lets the strategies know that need it.
        data_dir: folder with MNIST (see ``load_mnist``); None for the hub.

    Raises:
        UsageError: if an argument is out of range or the data is missing.
    """

    def __init__(
        self,
        num_tasks: Permutations = 10,
        order_seed: OrderSeed = 0,
        identity_first: bool = False,
        validation_fraction: PartShare = 0.1,
        validation_split: HeldOut = "first",
        task_id_at_test: bool | None = None,
        data_dir: str | None = None,
    ) -> None:
        holdout = Holdout(validation_fraction, validation_split, order_seed)
        source = load_mnist(data_dir, alternative="permuted_digits")
        tasks = permuted_tasks(
            source, num_tasks, order_seed, holdout, identity_first, bool(task_id_at_test)
        )
        super().__init__(
            "pmnist",
            tasks,
            "domain",
            source.shape,
            source.fingerprint,
            task_id_at_test=task_id_at_test,
        )
