"""How a task sees the images: pixels moved or rotated, then normalised. Tensor code only."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, pad

from cl_bench.data import digest
from cl_bench.tasks.images.source import ImageSource, Moments


class Arrangement(Protocol):
    """Images (n, c, h, w) in, images (n, c', h', w') of one shape out, each on its own.

    Attributes:
        identity: names what is done; empty where nothing is.
    """

    @property
    def identity(self) -> str:
        """Names what is done."""

    def __call__(self, pixels: Tensor) -> Tensor:
        """The arranged images."""


class Unchanged:
    """The images as they are."""

    identity = ""

    def __call__(self, pixels: Tensor) -> Tensor:
        """``pixels`` itself."""
        return pixels


@dataclass(frozen=True)
class Permutation:
    """Moves pixels, in one order for all channels.

    Attributes:
        order: int64 (h * w,); output pixel ``j`` is input pixel ``order[j]``, row by row.
    """

    order: Tensor

    @property
    def identity(self) -> str:
        """By the order."""
        return f"permuted {digest({'order': self.order})}"

    def __call__(self, pixels: Tensor) -> Tensor:
        """(n, c, h, w) of any type, permuted."""
        flat = pixels.flatten(2)
        return flat.gather(2, self.order.expand(flat.shape)).view(pixels.shape)


@dataclass(frozen=True)
class Rotation:
    """Turns images counter-clockwise about their centre, bilinear, zeros coming in.

    Attributes:
        degrees: the angle; 90 is ``torch.rot90(x, 1, (2, 3))`` on square images.
    """

    degrees: float

    @property
    def identity(self) -> str:
        """By the angle."""
        return f"rotated {self.degrees!r}"

    def __call__(self, pixels: Tensor) -> Tensor:
        """float32 (n, c, h, w) of uint8 or float ``pixels``."""
        pixels = pixels.float()
        if self.degrees % 360 == 0:
            return pixels
        count, channels, height, width = pixels.shape
        cos, sin = math.cos(math.radians(self.degrees)), math.sin(math.radians(self.degrees))
        # Normalised coordinates are in units of half the width and half the height: without their
        # ratio an oblong image would be sheared.
        theta = torch.tensor([[cos, -sin * height / width, 0], [sin * width / height, cos, 0]])
        grid = affine_grid(theta[None], [1, channels, height, width], align_corners=False)
        grid = grid.expand(count, -1, -1, -1)
        return grid_sample(pixels, grid, "bilinear", "zeros", align_corners=False)


@dataclass(frozen=True)
class Framed:
    """Brings small or grey images to a common shape: a black frame around them, channels repeated.

    Attributes:
        shape: (channels, height, width) of the result; a frame must be equally wide on opposite
            sides, and only one channel can become several.
    """

    shape: tuple[int, int, int]

    @property
    def identity(self) -> str:
        """By the shape."""
        return f"framed {self.shape}"

    def __call__(self, pixels: Tensor) -> Tensor:
        """(n, *shape), of the type of ``pixels``."""
        channels, height, width = self.shape
        top, left = (height - pixels.shape[2]) // 2, (width - pixels.shape[3]) // 2
        framed = pad(pixels, (left, left, top, top))
        return framed.expand(-1, channels, -1, -1)


@dataclass(frozen=True)
class View:
    """Arranges, then maps pixels to (x / maximum - mean) / std.

    Attributes:
        arrange: acts on the raw values, so that what a rotation brings in is black.
        moments: mean and standard deviation of each channel.
        maximum: pixel value that becomes 1.
    """

    arrange: Arrangement
    moments: Moments
    maximum: int

    def __call__(self, pixels: Tensor) -> Tensor:
        """float32 (n, c, h, w) of uint8 ``pixels``."""
        arranged = self.arrange(pixels)
        x = arranged.float() if arranged.dtype != torch.float32 else arranged.clone()
        x.div_(self.maximum)
        mean = torch.tensor(self.moments.mean).view(-1, 1, 1)
        std = torch.tensor(self.moments.std).view(-1, 1, 1)
        return x.sub_(mean).div_(std)


def view_of(source: ImageSource, arrange: Arrangement) -> View:
    """``arrange`` followed by the normalisation of ``source``."""
    return View(arrange, source.moments, source.maximum)
