"""Split Fashion-MNIST."""

from dataclasses import replace

from cl_bench.contracts.errors import UsageError
from cl_bench.contracts.options import Count, PartShare
from cl_bench.contracts.stream import Scenario, Stream
from cl_bench.tasks import five_datasets
from cl_bench.tasks.arguments import HeldOut, Order, SplitSeed
from cl_bench.tasks.images.arrange import Holdout, split_tasks
from cl_bench.tasks.images.files import Wanted
from cl_bench.tasks.images.load import load_images
from cl_bench.tasks.images.source import Moments

KNOWN = five_datasets.KNOWN["fashion_mnist"]
NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
)  # fmt: skip
MOMENTS = Moments((0.2860,), (0.3530,))
"""Of the training images."""


class SplitFashionMNIST(Stream):
    """Fashion-MNIST, some classes a task.

    Args:
        num_tasks: how many; None for as many as ``classes_per_task`` makes, fewer leave some out.
        classes_per_task: how many classes each; None to divide all ten evenly among ``num_tasks``.
        first_classes: of the first task; None for as many as the others.
        scenario: ``task`` (a head each, task id known), ``class`` (a head each, unknown) or
            ``domain`` (one head, every task's classes numbered from 0).
        class_order: ``fixed`` (0, 1, ...) or ``random``.
        order_seed: of the random order of classes and of a random validation split.
        validation_fraction: share of each task's training data held out.
        validation_split: hold out the ``first`` or ``random`` rows of each task.
        data_dir: folder with the four IDX files of its repository (gzipped or not), or with parquet
            files or class folders as :class:`~tasks.split_images.SplitImages` takes; None for the
            hub.

    Raises:
        UsageError: if an argument is out of range, the classes cannot be divided so or the data is
            missing.
    """

    def __init__(
        self,
        num_tasks: Count | None = None,
        classes_per_task: Count | None = 2,
        first_classes: Count | None = None,
        scenario: Scenario = "task",
        class_order: Order = "fixed",
        order_seed: SplitSeed = 0,
        validation_fraction: PartShare = 0.1,
        validation_split: HeldOut = "random",
        data_dir: str | None = None,
    ) -> None:
        source = load_images(
            Wanted(KNOWN.hub_id, data_dir, "split_digits"),
            licence=KNOWN.licence,
            citation=KNOWN.citation,
            grayscale=True,
            moments=MOMENTS,
        )
        if source.shape != (1, 28, 28) or source.num_classes != 10:
            raise UsageError(
                f"stream.data_dir={data_dir}: Fashion-MNIST has 10 classes of 28x28 images, this "
                f"data has {source.num_classes} of {source.shape[1]}x{source.shape[2]}; use "
                "+stream=split_images"
            )
        tasks = split_tasks(
            replace(source, class_names=NAMES),
            num_tasks,
            classes_per_task,
            order_seed,
            Holdout(validation_fraction, validation_split, order_seed),
            scenario,
            class_order,
            first_classes,
        )
        super().__init__("split_fashion_mnist", tasks, scenario, source.shape, source.fingerprint)
