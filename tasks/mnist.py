"""MNIST: 60,000 training and 10,000 test images of 28x28 pixels in the official order."""

from cl_bench.contracts.errors import UsageError
from cl_bench.tasks.images.files import Wanted
from cl_bench.tasks.images.load import load_images
from cl_bench.tasks.images.source import ImageSource, Moments

HUB_ID = "ylecun/mnist"
LICENCE = "commonly given as CC BY-SA 3.0"
CITATION = (
    "Y. LeCun, L. Bottou, Y. Bengio and P. Haffner, Gradient-based learning applied to document "
    "recognition, Proceedings of the IEEE 86(11), 1998"
)
# The constants of the PMNIST code of HAT and GPM, and of most others.
MOMENTS = Moments((0.1307,), (0.3081,))


def load_mnist(data_dir: str | None, alternative: str, moments: Moments = MOMENTS) -> ImageSource:
    """MNIST from ``data_dir`` or the hub.

    Args:
        data_dir: folder with ``train*.parquet`` and ``test*.parquet`` (columns image, label) or
            ``train/<class>/*.png`` and ``test/<class>/*.png``; None for the hub.
        alternative: embedded stream that the error for missing data proposes.
        moments: to normalise with.

    Raises:
        UsageError: if the data is missing or is not 28x28 with ten classes.
    """
    source = load_images(
        Wanted(HUB_ID, data_dir, alternative),
        licence=LICENCE,
        citation=CITATION,
        grayscale=True,
        moments=moments,
    )
    if source.shape != (1, 28, 28) or source.num_classes != 10:
        raise UsageError(
            f"stream.data_dir={data_dir}: MNIST has 10 classes of 28x28 images, this data has "
            f"{source.num_classes} of {source.shape[1]}x{source.shape[2]}; use +stream=split_images"
        )
    return source
