"""Split miniImageNet: 100 classes of ImageNet at 84x84 pixels."""

from dataclasses import replace

from cl_bench.contracts.errors import UsageError
from cl_bench.contracts.options import Count, PartShare
from cl_bench.contracts.stream import Scenario, Stream
from cl_bench.tasks.arguments import HeldOut, Order, SplitSeed
from cl_bench.tasks.images.arrange import Holdout, split_tasks
from cl_bench.tasks.images.files import Wanted
from cl_bench.tasks.images.load import load_images
from cl_bench.tasks.images.source import Moments

LICENCE = "ImageNet terms of access: non-commercial research and education"
CITATION = (
    "O. Vinyals, C. Blundell, T. Lillicrap, K. Kavukcuoglu and D. Wierstra, Matching networks for "
    "one shot learning, NIPS 2016 (miniImageNet); O. Russakovsky et al., ImageNet large scale "
    "visual recognition challenge, IJCV 115(3), 2015"
)
# ImageNet's constants, which TRGP's code uses.
MOMENTS = Moments((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class SplitMiniImageNet(Stream):
    """miniImageNet resized to 84x84, some classes a task, in random order as in TRGP's code.

    Continual learning needs all 100 classes in training and in test data (500 and 100 images
    each), unlike the few-shot splits of miniImageNet, whose classes are disjoint. The hub's data
    set has them as ``train`` and ``validation``; by its card its classes are not quite those of
    Vinyals et al. Inputs are made from 8-bit images when they are fetched.
    Source: github.com/LYang-666/TRGP @ 6f5536e, dataloader/miniimagenet.py.

    Args:
        num_tasks: how many; None for as many as ``classes_per_task`` makes, fewer leave some
            classes out.
        classes_per_task: how many classes each; None to divide all 100 evenly among ``num_tasks``.
        scenario: ``task`` (a head each, task id known), ``class`` (a head each, unknown) or
            ``domain`` (one head, every task's classes numbered from 0).
        class_order: ``fixed`` (0, 1, ...) or ``random``.
        order_seed: of the random order of classes and of a random validation split.
        validation_fraction: share of each task's training data held out.
        validation_split: hold out the ``first`` or ``random`` rows of each task.
        dataset: hub id, used where ``data_dir`` is None.
        test_split: name of the split that serves as test data, on the hub or in ``data_dir``.
        data_dir: folder with ``train*.parquet`` and ``<test_split>*.parquet`` (columns image,
            label) or ``train/<class>/*.jpg`` and ``<test_split>/<class>/*.jpg``; None for the hub.

    Raises:
        UsageError: if an argument is out of range, the classes cannot be divided so or the data is
            missing.
    """

    def __init__(
        self,
        num_tasks: Count | None = 20,
        classes_per_task: Count | None = None,
        scenario: Scenario = "task",
        class_order: Order = "random",
        order_seed: SplitSeed = 0,
        validation_fraction: PartShare = 0.02,
        validation_split: HeldOut = "random",
        dataset: str = "timm/mini-imagenet",
        test_split: str = "validation",
        data_dir: str | None = None,
    ) -> None:
        holdout = Holdout(validation_fraction, validation_split, order_seed)
        source = load_images(
            Wanted(dataset, data_dir, "split_digits", test_split=test_split),
            licence=LICENCE,
            citation=CITATION,
            grayscale=False,
            image_size=(84, 84),
            moments=MOMENTS,
        )
        if source.num_classes != 100:
            raise UsageError(
                f"stream.data_dir={'null' if data_dir is None else data_dir}: miniImageNet has 100 "
                f"classes, this data has {source.num_classes}; use +stream=split_images"
            )
        tasks = split_tasks(
            replace(source, in_memory=False),
            num_tasks,
            classes_per_task,
            order_seed,
            holdout,
            scenario,
            class_order,
        )
        super().__init__("split_mini_imagenet", tasks, scenario, source.shape, source.fingerprint)
