"""CUB-200-2011, ImageNet-R, ImageNet-A: what pre-trained backbones are compared on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from cl_bench.contracts.options import Count, PartShare
from cl_bench.contracts.stream import Scenario, Stream
from cl_bench.tasks.arguments import ClassOrder, HeldOut, SplitSeed, require
from cl_bench.tasks.images.arrange import Holdout, split_tasks
from cl_bench.tasks.images.files import Wanted
from cl_bench.tasks.images.load import load_images
from cl_bench.tasks.images.source import Moments

CLASSES = 200
IMAGENET = Moments((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Known:
    """A benchmark of 200 classes.

    Attributes:
        licence: as its authors state it.
        citation: whom to cite.
        classes_of: data sets that hold all of its classes, with who says so.
    """

    licence: str
    citation: str
    classes_of: dict[str, str] = field(default_factory=dict)


KNOWN = {
    "cub200": Known(
        "none stated; non-commercial research use, the images belong to their owners",
        "C. Wah, S. Branson, P. Welinder, P. Perona and S. Belongie, The Caltech-UCSD "
        "Birds-200-2011 dataset, technical report CNS-TR-2011-001, California Institute of "
        "Technology, 2011",
    ),
    "imagenet_r": Known(
        "MIT (the authors' repository); the images belong to their owners",
        "D. Hendrycks et al., The many faces of robustness: a critical analysis of "
        "out-of-distribution generalization, ICCV 2021",
        {"imagenet-1k": "Hendrycks et al., ICCV 2021: renditions of 200 ImageNet classes"},
    ),
    "imagenet_a": Known(
        "MIT (the authors' repository); the images belong to their owners",
        "D. Hendrycks, K. Zhao, S. Basart, J. Steinhardt and D. Song, Natural adversarial "
        "examples, CVPR 2021",
        {"imagenet-1k": "Hendrycks et al., CVPR 2021: images of 200 ImageNet classes"},
    ),
}


class CILImages(Stream):
    """One of the three, some classes a task; images are decoded and resized when they are fetched.

    None of the three comes with the split that papers use: folders with ``train`` and ``test`` as
    LAMDA-PILOT hands them out, or a data set of the hub with both splits, say it.

    Args:
        benchmark: which.
        dataset: hub id, ``org/name``; used where ``data_dir`` is None.
        data_dir: folder with ``train/<class>/*.jpg`` and ``test/<class>/*.jpg``, or with
            ``train*.parquet`` and ``test*.parquet``.
        image_column: name of the image column (hub, parquet).
        label_column: name of the label column (hub, parquet).
        test_split: name of the split that serves as test data.
        image_size: edge length, or (height, width); the aspect ratio is not kept.
        num_tasks: how many; None for as many as ``classes_per_task`` makes.
        classes_per_task: how many classes each, the first task apart; None to divide evenly.
        first_classes: of the first task; None for as many as the others.
        scenario: ``class`` (a head each, task id unknown), ``task`` or ``domain``.
        class_order: ``seed_1993`` (the papers'), ``fixed`` or ``random``.
        order_seed: of the random order of classes and of a random validation split.
        validation_fraction: share of each task's training data held out.
        validation_split: hold out the ``first`` or ``random`` rows of each task.
        train_per_class: the first so many training rows of every class; None for all.
        test_per_class: the same of test rows.

    Raises:
        UsageError: if an argument is out of range, or the data is missing or has not 200 classes.
    """

    def __init__(
        self,
        benchmark: Literal["cub200", "imagenet_r", "imagenet_a"],
        dataset: str | None = None,
        data_dir: str | None = None,
        image_column: str = "image",
        label_column: str = "label",
        test_split: str = "test",
        image_size: Count | Sequence[Count] = 224,
        num_tasks: Count | None = None,
        classes_per_task: Count | None = 20,
        first_classes: Count | None = None,
        scenario: Scenario = "class",
        class_order: ClassOrder = "seed_1993",
        order_seed: SplitSeed = 0,
        validation_fraction: PartShare = 0.0,
        validation_split: HeldOut = "random",
        train_per_class: Count | None = None,
        test_per_class: Count | None = None,
    ) -> None:
        known = KNOWN[benchmark]
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        require(len(size) == 2, "image_size", image_size, "give an edge length or [height, width]")
        source = load_images(
            Wanted(
                dataset,
                data_dir,
                "split_digits",
                image_column=image_column,
                label_column=label_column,
                test_split=test_split,
            ),
            licence=known.licence,
            citation=known.citation,
            grayscale=False,
            image_size=size,
            moments=IMAGENET,
            in_memory=False,
        )
        given = ("data_dir", data_dir) if data_dir is not None else ("dataset", dataset)
        remedy = f"{benchmark} has {CLASSES} classes, this data {source.num_classes}"
        require(
            source.num_classes == CLASSES, *given, f"{remedy}; use +stream=split_images for others"
        )
        tasks = split_tasks(
            source,
            num_tasks,
            classes_per_task,
            order_seed,
            Holdout(
                validation_fraction, validation_split, order_seed, train_per_class, test_per_class
            ),
            scenario,
            class_order,
            first_classes,
        )
        super().__init__(benchmark, tasks, scenario, source.shape, source.fingerprint)
        if known.classes_of:
            self.facts = {"classes_of": dict(known.classes_of)}
