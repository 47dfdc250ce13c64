"""IDX files, the format that MNIST and Fashion-MNIST are given in."""

import gzip
import io
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from cl_bench.contracts.errors import UsageError

NAMES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
"""Images and labels of each side; ``.gz`` may follow."""

UNSIGNED_BYTES = 8


def find_idx(folder: Path) -> dict[str, tuple[Path, Path]] | None:
    """The four files, images and labels by side; None unless all are there."""
    found = {}
    for side, names in NAMES.items():
        there = [
            next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
            for name in names
        ]
        if there[0] is None or there[1] is None:
            return None
        found[side] = (there[0], there[1])
    return found


def read_idx(path: Path) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """The array of a file.

    Raises:
        UsageError: it is no such file of bytes, or is cut short.
    """
    try:
        raw = path.read_bytes()
        content = gzip.decompress(raw) if path.suffix == ".gz" else raw
        zeros, kind, dimensions = struct.unpack(">HBB", content[:4])
        shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
    except (OSError, EOFError, struct.error) as error:
        raise UsageError(f"{path}: no IDX file ({error}); get it again") from error
    data = content[4 + 4 * dimensions :]
    if zeros or kind != UNSIGNED_BYTES or len(data) != math.prod(shape):
        raise UsageError(f"{path}: no whole IDX file of bytes; get it again")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def open_idx(
    files: dict[str, tuple[Path, Path]], image_column: str, label_column: str
) -> dict[str, Any]:
    """The sides as ``datasets.Dataset``, images as PNG bytes.

    Raises:
        UsageError: a file is damaged, or images and labels differ in number.
    """
    import datasets
    from PIL import Image

    features = datasets.Features(
        {image_column: datasets.Image(decode=False), label_column: datasets.Value("int64")}
    )
    found = {}
    for side, (image_path, label_path) in files.items():
        images, labels = read_idx(image_path), read_idx(label_path)
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise UsageError(
                f"{image_path}, {label_path}: arrays of shapes {images.shape} and {labels.shape} "
                "are no images with a label each; get them again"
            )
        cells = []
        for image in images:
            png = io.BytesIO()
            Image.fromarray(image).save(png, "PNG", compress_level=1)
            cells.append({"bytes": png.getvalue(), "path": None})
        rows = {image_column: cells, label_column: labels.astype(np.int64).tolist()}
        found[side] = datasets.Dataset.from_dict(rows, features=features)
    return found
