"""A labelled image data set with its official splits, before it is arranged into tasks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cl_bench.contracts.errors import UsageError
from cl_bench.contracts.stream import Origin
from cl_bench.tasks.arguments import require


class Pixels(Protocol):
    """uint8 images (n, channels, height, width) by int64 index (n,): a tensor, or files."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of each channel, in units of the largest pixel value."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class ImageSource:
    """Images and labels that all tasks share.

    Attributes:
        train: training images.
        train_labels: int64 (len(train),) in ``range(num_classes)``.
        test: test images.
        test_labels: int64 (len(test),) in ``range(num_classes)``.
        shape: (channels, height, width) of one image.
        num_classes: size of the label space.
        class_names: by label; none where they are not known.
        maximum: pixel value that becomes 1 before normalisation (255; 16 for the digits).
        moments: what the images are normalised with.
        fingerprint: content hash.
        origin: licence, source, citation.
        in_memory: whether tasks keep their inputs as ready float tensors, which takes four times
            the memory of the images; otherwise inputs are made whenever they are fetched.

    Raises:
        UsageError: if a split is empty, a label lies outside ``range(num_classes)`` or the moments
            do not fit the channels.
    """

    train: Pixels
    train_labels: Tensor
    test: Pixels
    test_labels: Tensor
    shape: tuple[int, int, int]
    num_classes: int
    maximum: int
    moments: Moments
    fingerprint: str
    origin: Origin
    in_memory: bool = True
    class_names: Sequence[str] = ()

    def __post_init__(self) -> None:
        channels = self.shape[0]
        for key, values in (("mean", self.moments.mean), ("std", self.moments.std)):
            remedy = f"the images have {channels} channels: give one number, or one a channel"
            require(len(values) in (1, channels), key, list(values), remedy)
        for split, labels in (("training", self.train_labels), ("test", self.test_labels)):
            if not len(labels):
                raise UsageError(f"{self.origin.source}: the {split} split holds no images")
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.num_classes:
                raise UsageError(
                    f"{self.origin.source}: the {split} split has labels from {low} to {high}, but "
                    f"its {self.num_classes} classes are 0 to {self.num_classes - 1}; correct the "
                    "labels, or name another stream.label_column or stream.test_split"
                )


def row_chunks(count: int, size: int) -> Iterator[Tensor]:
    """``arange(count)`` in consecutive pieces of at most ``size``."""
    for start in range(0, count, size):
        yield torch.arange(start, min(start + size, count))


def measure(pixels: Pixels, maximum: int = 255, chunk: int = 4096) -> Moments:
    """Moments of ``pixels`` over all images and positions, exact up to one rounding.

    Raises:
        UsageError: if a channel is constant, so that nothing can be divided by its deviation.
    """
    count, total, squares = 0, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    for rows in row_chunks(len(pixels), chunk):
        # uint8 squares fit int32; integer sums do not depend on the order or on the chunk.
        values = pixels[rows].to(torch.int32).transpose(0, 1).flatten(1)
        count += values.shape[1]
        total = total + values.sum(1)
        squares = squares + values.square().sum(1)
    mean = total.double() / count
    variance = squares.double() / count - mean.square()
    if bool((variance <= 0).any()):
        raise UsageError("stream.std=null: a colour channel is constant; set stream.mean and .std")
    return Moments(
        mean=tuple((mean / maximum).tolist()), std=tuple((variance.sqrt() / maximum).tolist())
    )
