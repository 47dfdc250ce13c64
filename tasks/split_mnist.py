"""Split MNIST."""

from cl_bench.contracts.options import Count, Index, PartShare, Rate, Share
from cl_bench.contracts.stream import Scenario, Stream
from cl_bench.tasks.arguments import HeldOut, Order, SplitSeed
from cl_bench.tasks.images.arrange import Holdout, split_tasks
from cl_bench.tasks.images.source import Moments
from cl_bench.tasks.images.views import Framed
from cl_bench.tasks.mnist import MOMENTS, load_mnist


class SplitMNIST(Stream):
    """MNIST, some classes a task.

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
        padding: black pixels that are set around every image, on each side.
        mean: of the pixels, which count from 0 to 1; inputs are (x - mean) / std.
        std: as ``mean``.
        data_dir: folder with MNIST (see ``load_mnist``); None for the hub.

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
        validation_split: HeldOut = "first",
        padding: Index = 0,
        mean: Share = MOMENTS.mean[0],
        std: Rate = MOMENTS.std[0],
        data_dir: str | None = None,
    ) -> None:
        holdout = Holdout(validation_fraction, validation_split, order_seed)
        source = load_mnist(data_dir, "split_digits", Moments((mean,), (std,)))
        channels, height, width = source.shape
        shape = (channels, height + 2 * padding, width + 2 * padding)
        tasks = split_tasks(
            source,
            num_tasks,
            classes_per_task,
            order_seed,
            holdout,
            scenario,
            class_order,
            first_classes,
            arrange=Framed(shape) if padding else None,
        )
        super().__init__("split_mnist", tasks, scenario, shape, source.fingerprint)
