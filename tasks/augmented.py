"""Data that training sees changed at random, another way in every epoch."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from cl_bench.contracts.randomness import generator
from cl_bench.contracts.stream import Batch, Data


class Transform(Protocol):
    """Images to images, each on its own, by numbers that are drawn for it."""

    @property
    def draws(self) -> int:
        """How many numbers an image needs."""

    def __call__(self, x: Tensor, drawn: Tensor) -> Tensor:
        """Images (n, c, h, w) as ``drawn`` (n, draws), uniform in [0, 1), says."""


@dataclass(frozen=True)
class Crop:
    """A window of the image's own size in the image with a frame of zeros around it.

    Zeros are the mean colour where images are normalised.

    Attributes:
        padding: pixels on every side.
    """

    padding: int = 4
    draws = 2

    def __call__(self, x: Tensor, drawn: Tensor) -> Tensor:
        """(n, c, h, w), every position as likely."""
        n, c, h, w = x.shape
        most = 2 * self.padding
        top, left = (drawn * (most + 1)).long().clamp_max(most).unbind(1)
        samples, channels = torch.arange(n).view(-1, 1, 1, 1), torch.arange(c).view(-1, 1, 1)
        rows = top.view(-1, 1, 1, 1) + torch.arange(h).view(-1, 1)
        columns = left.view(-1, 1, 1, 1) + torch.arange(w)
        return pad(x, (self.padding,) * 4)[samples, channels, rows, columns]


@dataclass(frozen=True)
class Flip:
    """Left and right swapped in half of the images."""

    draws = 1

    def __call__(self, x: Tensor, drawn: Tensor) -> Tensor:
        """(n, c, h, w)."""
        return torch.where(drawn.view(-1, 1, 1, 1) < 0.5, x.flip(3), x)


@dataclass(frozen=True)
class InTurn:
    """One transform after another.

    Attributes:
        transforms: the first one first.
    """

    transforms: tuple[Transform, ...]

    @property
    def draws(self) -> int:
        """Of all of them."""
        return sum(transform.draws for transform in self.transforms)

    def __call__(self, x: Tensor, drawn: Tensor) -> Tensor:
        """(n, c, h, w)."""
        own = torch.split(drawn, [transform.draws for transform in self.transforms], dim=1)
        for transform, numbers in zip(self.transforms, own, strict=True):
            x = transform(x, numbers)
        return x


class Augmented(Data):
    """Samples whose ``x`` training sees changed at random; indexing gives them as they are.

    Args:
        data: the samples.
        transform: what changes them.
    """

    def __init__(self, data: Data, transform: Transform) -> None:
        self.data = data
        self.transform = transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Tensor) -> Batch:
        return self.data[index]

    @property
    def tensors(self) -> Batch:
        """All samples, where they lie in memory."""
        tensors: Batch = self.data.tensors  # type: ignore[attr-defined]
        return tensors

    def augmented(self, seed: int) -> Data:
        """The samples as an epoch of that seed sees them, and beside them ``plain``.

        What happens to a sample is a function of the seed and of its position alone, whichever
        batch, worker or process it comes in.
        """
        return _View(self, seed)

    def likewise(self, data: Data) -> "Augmented":
        """Other samples, changed in the same way."""
        return Augmented(data, self.transform)


class _View(Data):
    def __init__(self, whole: Augmented, seed: int) -> None:
        self.data, self.transform = whole.data, whole.transform
        shape = len(whole), self.transform.draws
        self.drawn = torch.rand(shape, generator=generator(seed, "augmentation"))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Tensor) -> Batch:
        batch = self.data[index]
        x = batch["x"]
        return {**batch, "x": self.transform(x, self.drawn[index]), "plain": x}
