"""From image files to uint8 tensors, with Pillow."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cl_bench.contracts.errors import UsageError
from cl_bench.tasks.images.source import row_chunks

if TYPE_CHECKING:
    from PIL.Image import Image

GREY_MODES = ("1", "L", "LA", "La")
# Pillow clips these to 8 bits instead of scaling them, which would ruin the images in silence.
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


@dataclass(frozen=True)
class Form:
    """What every image is turned into.

    Attributes:
        channels: 1 (grey) or 3 (RGB).
        height: rows, in pixels.
        width: columns, in pixels.
        resize: bring other sizes to this one (bilinear) instead of refusing them.
        grey_guessed: ``channels`` was taken from the first image, so refuse colour later on.
    """

    channels: int
    height: int
    width: int
    resize: bool
    grey_guessed: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.channels, self.height, self.width


class EncodedImages:
    """Images as stored (PNG, JPEG, WebP, ...), decoded when they are fetched.

    Args:
        cells: rows of ``{"bytes": ..., "path": ...}`` under ``column``: a ``datasets.Dataset``
            whose image column has ``decode=False``.
        column: name of that column.
        form: the shape to decode to.
        root: folder in which images that are named by a path lie; None: anywhere.
    """

    def __init__(self, cells: Any, column: str, form: Form, root: Path | None = None) -> None:
        self.cells = cells
        self.column = column
        self.form = form
        self.root = root

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, index: Tensor) -> Tensor:
        """uint8 (n, channels, height, width) for int64 ``index`` (n,).

        Raises:
            UsageError: if an image cannot be decoded or does not fit the form.
        """
        rows = index.tolist()
        cells = self.cells[rows][self.column]
        pixels = np.empty((len(rows), *self.form.shape), dtype=np.uint8)

        def fill(part: range) -> None:
            for i in part:
                pixels[i] = self._decode(cells[i], rows[i])

        # One contiguous part a thread: handing over single small images costs more than they do.
        # The pool lives only here, so that forked loader workers never inherit dead threads.
        step = max(256, -(-len(rows) // min(8, os.cpu_count() or 1)))
        parts = [range(i, min(i + step, len(rows))) for i in range(0, len(rows), step)]
        if len(parts) <= 1:
            fill(range(len(rows)))
        else:
            with ThreadPoolExecutor(len(parts)) as pool:
                list(pool.map(fill, parts))
        return torch.from_numpy(pixels)

    def decode_all(self, chunk: int = 4096) -> Tensor:
        """All images: uint8 (len(self), channels, height, width)."""
        pixels = torch.empty((len(self), *self.form.shape), dtype=torch.uint8)
        for rows in row_chunks(len(self), chunk):
            pixels[rows] = self[rows]
        return pixels

    def _decode(
        self, cell: dict[str, Any] | None, row: int
    ) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        form = self.form
        image = open_image(cell, row, self.root)
        if form.grey_guessed and image.mode not in GREY_MODES:
            raise UsageError(
                f"stream.grayscale=null: the first image is grey but image {row} is in colour "
                f"({image.mode}); set stream.grayscale to true or false"
            )
        image = image.convert("L" if form.channels == 1 else "RGB")
        if image.size != (form.width, form.height):
            if not form.resize:
                raise UsageError(
                    f"stream.image_size=null: images differ in size, image {row} has "
                    f"{image.height}x{image.width} and not {form.height}x{form.width}; "
                    "set stream.image_size"
                )
            from PIL.Image import Resampling

            image = image.resize((form.width, form.height), Resampling.BILINEAR)
        pixels = np.asarray(image)
        return pixels[None] if form.channels == 1 else pixels.transpose(2, 0, 1)


def open_image(cell: dict[str, Any] | None, row: int, root: Path | None = None) -> "Image":
    """The Pillow image of one cell, loaded and upright.

    Raises:
        UsageError: there is none, it is broken, deeper than 8 bits a channel, or a file outside of
            ``root``.
    """
    from PIL import Image, ImageOps

    if cell is None or not (cell.get("bytes") or cell.get("path")):
        raise UsageError(f"image {row} of the stream's data is missing: leave that row out")
    where = f"image {row}" + (f" ({cell['path']})" if cell.get("path") else "")
    if cell.get("bytes") is None and root is not None and not _inside(cell["path"], root):
        raise UsageError(
            f"{where} of the stream's data is a file outside of {root}: put it there, or its bytes "
            "into the parquet file"
        )
    try:
        image = Image.open(cell["path"] if cell.get("bytes") is None else BytesIO(cell["bytes"]))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)  # as the photo was seen, not as it lay
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"{where} of the stream's data cannot be decoded: {error}") from error
    if image.mode in DEEP_MODES:
        raise UsageError(f"{where} has mode {image.mode}: convert the data to 8 bits a channel")
    return image


def _inside(path: str, root: Path) -> bool:
    """Whether a file lies in a folder by its name, or by where its name leads."""
    return any(
        Path(place(path)).is_relative_to(place(root))
        for place in (os.path.abspath, os.path.realpath)
    )


def choose_form(
    first: dict[str, Any] | None,
    grayscale: bool | None,
    image_size: Sequence[int] | None,
    root: Path | None = None,
) -> Form:
    """The common form of a data set's images.

    Args:
        first: cell of the first training image: gives what the other arguments leave open.
        grayscale: one channel, three, or (None) as in the first image.
        image_size: (height, width), or None for the size of the first image.
        root: as in :class:`EncodedImages`.
    """
    image = open_image(first, 0, root)
    grey = image.mode in GREY_MODES if grayscale is None else grayscale
    height, width = (image.height, image.width) if image_size is None else image_size
    return Form(
        channels=1 if grey else 3,
        height=height,
        width=width,
        resize=image_size is not None,
        grey_guessed=grayscale is None and grey,
    )
