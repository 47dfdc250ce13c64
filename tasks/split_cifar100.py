"""Split CIFAR-100, as in the gradient-projection papers."""

from typing import Literal

from cl_bench.contracts.options import Count, PartShare
from cl_bench.contracts.stream import Scenario, Stream
from cl_bench.tasks.arguments import ClassOrder, HeldOut, SplitSeed, require
from cl_bench.tasks.augmented import Crop, Flip, InTurn
from cl_bench.tasks.cifar100 import load_cifar100
from cl_bench.tasks.images.arrange import Holdout, split_tasks
from cl_bench.tasks.images.imagenet import among_imagenet
from cl_bench.tasks.images.source import ImageSource


class SplitCIFAR100(Stream):
    """CIFAR-100, some classes a task; classes 0 ... 9 first, and so on, as in GPM and HAT.

    Source: github.com/sahagobinda/GPM @ dc5ba5c, dataloader/cifar100.py: class order,
    normalisation, 5 % of each task's training images held out at random. Which images these are
    differs from theirs: copies of the data set differ in the order of their rows.

    Args:
        num_tasks: how many (the papers' 10 or 20); None for as many as ``classes_per_task`` makes,
            fewer leave some classes out.
        classes_per_task: how many classes each; None to divide all 100 evenly among ``num_tasks``.
        scenario: ``task`` (a head each, task id known), ``class`` (a head each, unknown) or
            ``domain`` (one head, every task's classes numbered from 0).
        class_order: ``fixed`` (0, 1, ...), ``random`` or ``seed_1993``, that of class-incremental
            papers since iCaRL.
        first_classes: of the first task; None for as many as the others. With 50 and
            ``num_tasks`` null, ``classes_per_task`` 10, class-incremental papers' B50 in steps of
            10; B0 in steps of 10 needs neither.
        order_seed: of the random order of classes and of a random validation split.
        validation_fraction: share of each task's training data held out.
        validation_split: hold out the ``first`` or ``random`` rows of each task.
        augment: what training does to its images, anew in every epoch: ``none``, or ``crop_flip``
            (a window of 32x32 pixels in the image with 4 more around it, flipped in half of the
            cases). What strategies look at by themselves and evaluation data is never augmented.
        train_per_class: the first so many training images of every class; None for all 500.
        test_per_class: the same of test images; None for all 100.
        classes: ``all`` 100, or those ``without_imagenet``'s: the 37 whose names are not among the
            names of ImageNet's classes (:data:`cl_bench.tasks.images.imagenet.CRITERION`), for
            backbones that were trained on it.
        data_dir: folder with CIFAR-100 (see ``load_cifar100``); None for the hub.

    Raises:
        UsageError: if an argument is out of range, the classes cannot be divided so or the data is
            missing.
    """

    def __init__(
        self,
        num_tasks: Count | None = 10,
        classes_per_task: Count | None = None,
        scenario: Scenario = "task",
        class_order: ClassOrder = "fixed",
        first_classes: Count | None = None,
        order_seed: SplitSeed = 0,
        validation_fraction: PartShare = 0.05,
        validation_split: HeldOut = "random",
        augment: Literal["none", "crop_flip"] = "none",
        train_per_class: Count | None = None,
        test_per_class: Count | None = None,
        classes: Literal["all", "without_imagenet"] = "all",
        data_dir: str | None = None,
    ) -> None:
        holdout = Holdout(
            validation_fraction, validation_split, order_seed, train_per_class, test_per_class
        )
        source = load_cifar100(data_dir)
        tasks = split_tasks(
            source,
            num_tasks,
            classes_per_task,
            order_seed,
            holdout,
            scenario,
            class_order,
            first_classes,
            None if classes == "all" else _without_imagenet(source),
        )
        if augment == "crop_flip":
            for task in tasks:
                task.augment = InTurn((Crop(4), Flip()))
        super().__init__("split_cifar100", tasks, scenario, source.shape, source.fingerprint)


def _without_imagenet(source: ImageSource) -> list[int]:
    found = among_imagenet(source.class_names)
    remedy = "the data does not name its classes; use data that does, or all"
    require(found is not None, "classes", "without_imagenet", remedy)
    return [label for label, among in enumerate(found or ()) if not among]
