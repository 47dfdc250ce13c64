"""Five data sets of ten classes each, one after another."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cl_bench.contracts.errors import UsageError
from cl_bench.contracts.options import PartShare
from cl_bench.contracts.stream import Scenario, Stream
from cl_bench.tasks import cifar100, mnist
from cl_bench.tasks.arguments import HeldOut, OrderSeed, require
from cl_bench.tasks.images.arrange import Holdout, Part, class_tasks
from cl_bench.tasks.images.files import Wanted
from cl_bench.tasks.images.load import load_images
from cl_bench.tasks.images.source import ImageSource, Moments
from cl_bench.tasks.images.views import Framed

SHAPE = (3, 32, 32)


@dataclass(frozen=True)
class Known:
    """One of the five.

    Attributes:
        hub_id: on the Hugging Face hub.
        grayscale: one channel, which is repeated, or three.
        moments: of the images in their frame; HAT's constants, which GPM's code uses too.
        licence: as stated by the authors.
        citation: whom to cite.
        config_name: configuration on the hub.
        aliases: what the columns are called on the hub.
    """

    hub_id: str
    grayscale: bool
    moments: Moments
    licence: str
    citation: str
    config_name: str | None = None
    aliases: tuple[tuple[str, str], ...] = ()


KNOWN = {
    "cifar10": Known(
        "uoft-cs/cifar10",
        False,
        cifar100.MOMENTS,
        cifar100.LICENCE,
        cifar100.CITATION,
        aliases=(("image", "img"),),
    ),
    "mnist": Known(mnist.HUB_ID, True, Moments((0.1,), (0.2752,)), mnist.LICENCE, mnist.CITATION),
    "svhn": Known(
        "ufldl-stanford/svhn",
        False,
        Moments((0.4377, 0.4438, 0.4728), (0.198, 0.201, 0.197)),
        "non-commercial use only",
        "Y. Netzer, T. Wang, A. Coates, A. Bissacco, B. Wu and A. Y. Ng, Reading digits in natural "
        "images with unsupervised feature learning, NIPS workshop, 2011",
        config_name="cropped_digits",
    ),
    "fashion_mnist": Known(
        "zalando-datasets/fashion_mnist",
        True,
        Moments((0.2190,), (0.3318,)),
        "MIT",
        "H. Xiao, K. Rasul and R. Vollgraf, Fashion-MNIST: a novel image dataset for benchmarking "
        "machine learning algorithms, arXiv:1708.07747, 2017",
    ),
    "notmnist": Known(
        "anubhavmaity/notMNIST",
        True,
        Moments((0.4254,), (0.4501,)),
        "none stated; research use",
        "Y. Bulatov, notMNIST dataset, yaroslavvb.blogspot.com/2011/09/notmnist-dataset.html, 2011",
    ),
}
"""The data sets in the order in which GPM's code learns them."""


class FiveDatasets(Stream):
    """CIFAR-10, MNIST, SVHN, Fashion-MNIST and notMNIST as 32x32 colour images, a task each.

    Smaller images get a black frame of 2 pixels, grey ones three equal channels. Inputs are made
    when they are fetched: all of them at once would take several gigabytes.
    Source: github.com/sahagobinda/GPM @ 137482d, dataloader/five_datasets.py.

    Args:
        datasets: which, in the order of the tasks.
        scenario: ``task`` (a head each, task id known), ``class`` (a head each, unknown) or
            ``domain`` (one head, every task's classes numbered from 0).
        order_seed: of a random validation split.
        validation_fraction: share of each task's training data held out.
        validation_split: hold out the ``first`` or ``random`` rows of each task.
        data_dir: folder with a subfolder for each of ``datasets``, of that name, with
            ``train*.parquet`` and ``test*.parquet`` (columns image or img, label) or
            ``train/<class>/*.png`` and ``test/<class>/*.png``; None for the hub.

    Raises:
        UsageError: if an argument is out of range or data is missing or of another shape.
    """

    def __init__(
        self,
        datasets: Sequence[str] = ("cifar10", "mnist", "svhn", "fashion_mnist", "notmnist"),
        scenario: Scenario = "task",
        order_seed: OrderSeed = 0,
        validation_fraction: PartShare = 0.05,
        validation_split: HeldOut = "random",
        data_dir: str | None = None,
    ) -> None:
        names = list(datasets)
        remedy = f"name each task once, out of {', '.join(KNOWN)}"
        chosen = bool(names) and set(names) <= set(KNOWN) and len(set(names)) == len(names)
        require(chosen, "datasets", names, remedy)
        holdout = Holdout(validation_fraction, validation_split, order_seed)
        sources = {name: _load(name, tuple(names), data_dir) for name in names}
        parts = [
            Part(name, source, list(range(10)), Framed(SHAPE)) for name, source in sources.items()
        ]
        prints = " ".join(source.fingerprint for source in sources.values())
        super().__init__(
            "five_datasets",
            class_tasks(parts, scenario, holdout),
            scenario,
            SHAPE,
            hashlib.sha256(prints.encode()).hexdigest(),
        )


def _load(name: str, names: tuple[str, ...], data_dir: str | None) -> ImageSource:
    known = KNOWN[name]
    source = load_images(
        Wanted(
            known.hub_id,
            data_dir,
            "split_digits",
            config_name=known.config_name,
            aliases=known.aliases,
            subfolder=name,
            subfolders=names,
        ),
        licence=known.licence,
        citation=known.citation,
        grayscale=known.grayscale,
        moments=known.moments,
    )
    _, height, width = source.shape
    if (height, width) not in ((28, 28), (32, 32)) or source.num_classes != 10:
        raise UsageError(
            f"stream.data_dir={data_dir}: {name} has 10 classes of 28x28 or 32x32 images, this "
            f"data has {source.num_classes} of {height}x{width}; use +stream=split_images"
        )
    return replace(source, in_memory=False)
