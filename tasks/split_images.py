"""A stream from any labelled image data set: split by class, permuted or rotated."""

from collections.abc import Sequence
from typing import Annotated, Literal

from cl_bench.contracts.options import Count, PartShare, Range
from cl_bench.contracts.stream import Scenario, Stream
from cl_bench.tasks.arguments import Angle, ClassOrder, HeldOut, Order, OrderSeed, require
from cl_bench.tasks.images.arrange import Holdout, permuted_tasks, rotated_tasks, split_tasks
from cl_bench.tasks.images.files import Wanted
from cl_bench.tasks.images.load import load_images
from cl_bench.tasks.images.source import Moments

SomePart = Annotated[float, Range(above=0, below=1)]


class SplitImages(Stream):
    """Images from the hub or a folder, arranged as ``how`` says.

    Arguments that belong to another ``how`` than the chosen one must stay None.

    Args:
        dataset: hub id, ``org/name``; used where ``data_dir`` is None.
        data_dir: folder with ``train*.parquet`` and ``test*.parquet``, or with
            ``train/<class>/*.png`` and ``test/<class>/*.png`` (or another image format), or with
            ``<class>/*.png`` alone, which are divided by ``test_fraction``.
        revision: branch, tag or commit on the hub.
        config_name: configuration on the hub.
        image_column: name of the image column (hub, parquet).
        label_column: name of the label column (hub, parquet): integers from 0.
        renumber_labels: count the labels that occur in training from 0, in their order: for gaps,
            labels from 1, and text.
        test_split: name of the split that serves as test data.
        test_fraction: share of every class that is test data, of a folder without splits.
        split_seed: decides which.
        image_size: edge length, or (height, width), to resize to (bilinear, aspect ratio not kept);
            None keeps the size, which all images must share.
        grayscale: one channel (true), three (false), or (None) as in the first training image.
        mean: per channel (or one for all), pixels counted from 0 to 1; None for the training
            split's. Set ``mean`` and ``std`` together.
        std: as ``mean``.
        in_memory: decode once into a uint8 tensor and cache it; false decodes whenever rows are
            fetched, for data that does not fit. The data files are read once at start to hash them.
        how: ``split`` by class, ``permuted`` or ``rotated``.
        num_tasks: how many. None: 10, or as many as ``classes_per_task`` makes.
        classes_per_task: split: how many classes each; None to divide all evenly. If both are set
            the stream may leave classes out.
        scenario: split: ``task`` (the default), ``class`` or ``domain``. Others: ``domain``.
        class_order: split: ``fixed`` (the default), ``random``, or ``seed_1993`` (100 or 200
            classes).
        first_classes: split: of the first task; None for as many as the others.
        identity_first: permuted: leave the first task's pixels where they are (default false).
        max_angle: rotated: in (0, 360] degrees, itself not reached (default 180).
        angle_order: rotated: ``fixed`` (growing, the default) or ``random``.
        order_seed: of permutations, random orders and a random validation split.
        validation_fraction: share of each task's training data held out.
        validation_split: hold out the ``first`` or ``random`` rows.
        train_per_class: the first so many training rows of every class; None for all.
        test_per_class: the same of test rows.
        licence: of the data, for the record.
        citation: of the data, for the record.

    Raises:
        UsageError: if an argument is out of range, does not apply, or the data is missing.
    """

    def __init__(
        self,
        dataset: str | None = None,
        data_dir: str | None = None,
        revision: str | None = None,
        config_name: str | None = None,
        image_column: str = "image",
        label_column: str = "label",
        renumber_labels: bool = False,
        test_split: str = "test",
        test_fraction: SomePart = 0.2,
        split_seed: OrderSeed = 0,
        image_size: Count | Sequence[Count] | None = None,
        grayscale: bool | None = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        in_memory: bool = True,
        how: Literal["split", "permuted", "rotated"] = "split",
        num_tasks: Count | None = None,
        classes_per_task: Count | None = None,
        scenario: Scenario | None = None,
        class_order: ClassOrder | None = None,
        first_classes: Count | None = None,
        identity_first: bool | None = None,
        max_angle: Angle | None = None,
        angle_order: Order | None = None,
        order_seed: OrderSeed = 0,
        validation_fraction: PartShare = 0.1,
        validation_split: HeldOut = "random",
        train_per_class: Count | None = None,
        test_per_class: Count | None = None,
        licence: str = "unknown: see the source",
        citation: str = "unknown: see the source",
    ) -> None:
        _applies(how, "split", classes_per_task=classes_per_task, class_order=class_order)
        _applies(how, "split", first_classes=first_classes)
        _applies(how, "permuted", identity_first=identity_first)
        _applies(how, "rotated", max_angle=max_angle, angle_order=angle_order)
        scenario = scenario or ("task" if how == "split" else "domain")
        if how != "split":
            remedy = f"how={how} keeps its classes from task to task: use domain"
            require(scenario == "domain", "scenario", scenario, remedy)
        if data_dir is not None:
            hub = {"dataset": dataset, "revision": revision, "config_name": config_name}
            for key, value in hub.items():
                require(value is None, key, value, "data_dir is used instead: set one of the two")
        holdout = Holdout(
            validation_fraction, validation_split, order_seed, train_per_class, test_per_class
        )
        source = load_images(
            Wanted(
                dataset,
                data_dir,
                f"{how}_digits",
                revision=revision,
                config_name=config_name,
                image_column=image_column,
                label_column=label_column,
                test_split=test_split,
                test_fraction=test_fraction,
                split_seed=split_seed,
            ),
            licence=licence,
            citation=citation,
            grayscale=grayscale,
            image_size=_height_width(image_size),
            moments=_moments(mean, std),
            in_memory=in_memory,
            renumber=renumber_labels,
        )
        count = 10 if num_tasks is None else num_tasks
        if how == "split":
            tasks = split_tasks(
                source,
                count if classes_per_task is None else num_tasks,
                classes_per_task,
                order_seed,
                holdout,
                scenario,
                class_order or "fixed",
                first_classes,
            )
        elif how == "permuted":
            tasks = permuted_tasks(source, count, order_seed, holdout, bool(identity_first))
        else:
            angle = 180.0 if max_angle is None else max_angle
            order = angle_order or "fixed"
            tasks = rotated_tasks(source, count, order_seed, holdout, angle, order)
        super().__init__(f"{how}_images", tasks, scenario, source.shape, source.fingerprint)


def _applies(chosen: str, how: str, **arguments: object) -> None:
    for key, value in arguments.items():
        remedy = f"has no effect with stream.how={chosen}; leave it null or set stream.how={how}"
        require(value is None or chosen == how, key, value, remedy)


def _height_width(image_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if image_size is None:
        return None
    pair = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    remedy = "give an edge length or [height, width] in pixels, at least 1"
    require(len(pair) == 2 and min(pair) >= 1, "image_size", image_size, remedy)
    return pair[0], pair[1]


def _moments(
    mean: float | Sequence[float] | None, std: float | Sequence[float] | None
) -> Moments | None:
    if mean is None and std is None:
        return None
    require(mean is not None, "mean", mean, "stream.std is set: set both, or neither")
    require(std is not None, "std", std, "stream.mean is set: set both, or neither")
    values = [
        (float(v),) if isinstance(v, int | float) else tuple(float(x) for x in v)
        for v in (mean, std)
        if v is not None
    ]
    require(min(values[1]) > 0, "std", std, "standard deviations must be above 0")
    return Moments(*values)
