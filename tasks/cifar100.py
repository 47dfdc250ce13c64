"""CIFAR-100: 50,000 training and 10,000 test images of 32x32 pixels, 100 classes of 600 each."""

from cl_bench.contracts.errors import UsageError
from cl_bench.tasks.images.files import Wanted
from cl_bench.tasks.images.load import load_images
from cl_bench.tasks.images.source import ImageSource, Moments

HUB_ID = "uoft-cs/cifar100"
LICENCE = "none stated by the authors; research use"
CITATION = (
    "A. Krizhevsky, Learning multiple layers of features from tiny images, technical report, "
    "University of Toronto, 2009"
)
# CIFAR-10's constants, which the CIFAR-100 code of HAT, GPM and their successors uses.
MOMENTS = Moments((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255))


def load_cifar100(data_dir: str | None) -> ImageSource:
    """CIFAR-100 from ``data_dir`` or the hub, normalised with :data:`MOMENTS`.

    Args:
        data_dir: folder with ``train*.parquet`` and ``test*.parquet`` (columns image or img, label
            or fine_label) or ``train/<class>/*.png`` and ``test/<class>/*.png``; None for the hub.

    Raises:
        UsageError: if the data is missing or is not 32x32 in colour with 100 classes.
    """
    source = load_images(
        Wanted(
            HUB_ID,
            data_dir,
            "split_digits",
            aliases=(("image", "img"), ("label", "fine_label")),
        ),
        licence=LICENCE,
        citation=CITATION,
        grayscale=False,
        moments=MOMENTS,
    )
    if source.shape != (3, 32, 32) or source.num_classes != 100:
        raise UsageError(
            f"stream.data_dir={data_dir}: CIFAR-100 has 100 classes of 32x32 images, this data has "
            f"{source.num_classes} of {source.shape[1]}x{source.shape[2]}; use +stream=split_images"
        )
    return source
