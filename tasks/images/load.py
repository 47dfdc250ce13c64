"""From a data set that was found to an :class:`ImageSource`."""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cl_bench.contracts.errors import UsageError
from cl_bench.contracts.stream import Origin
from tasks.images.cache import cached
from tasks.images.decode import EncodedImages, choose_form
from tasks.images.files import Located, Wanted, arrow_directory, locate
from tasks.images.source import ImageSource, Moments, Pixels, measure


def load_images(
    wanted: Wanted,
    *,
    licence: str,
    citation: str,
    grayscale: bool | None = None,
    image_size: Sequence[int] | None = None,
    moments: Moments | None = None,
    in_memory: bool = True,
) -> ImageSource:
    """Find, decode and check a labelled image data set.

    Args:
        wanted: which data, and how its columns and splits are called.
        licence: for the record.
        citation: for the record.
        grayscale: one channel, three, or (None) as the first training image.
        image_size: (height, width) to resize to; None keeps the size, which must be common.
        moments: to normalise with; None for those of the training split.
        in_memory: decode everything now (and cache it); otherwise decode when rows are fetched, and
            take as fingerprint the hash of the encoded data and of how it is decoded.

    Raises:
        UsageError: if the data is missing, or does not fit the arguments.
    """
    located = locate(wanted)
    choices = [wanted.image_column, wanted.label_column, wanted.test_split, grayscale, image_size]
    identity = hashlib.sha256(json.dumps([1, located.identity, *choices]).encode()).hexdigest()
    train: Pixels
    test: Pixels
    if in_memory:

        def decode() -> dict[str, Tensor]:
            with tempfile.TemporaryDirectory(prefix="cl_bench_") as arrow:
                splits = _encoded(located.open(Path(arrow)), wanted, grayscale, image_size)
                return {
                    "train": splits["train"].decode_all(),
                    "test": splits["test"].decode_all(),
                    **_labels(splits, wanted),
                }

        data, fingerprint = cached(identity, decode)
        train, test = data["train"], data["test"]
        _, channels, height, width = data["train"].shape
    else:
        splits = _encoded(_open_kept(located, wanted), wanted, grayscale, image_size)
        data, fingerprint = _labels(splits, wanted), identity
        train, test = splits["train"], splits["test"]
        channels, height, width = splits["train"].form.shape
    return ImageSource(
        train=train,
        train_labels=data["train_labels"],
        test=test,
        test_labels=data["test_labels"],
        shape=(channels, height, width),
        num_classes=int(data["num_classes"]),
        maximum=255,
        moments=moments or _cached_moments(identity, train),
        fingerprint=fingerprint,
        origin=Origin(located.source, licence, citation),
        in_memory=in_memory,
    )


def _open_kept(located: Located, wanted: Wanted) -> dict[str, Any]:
    arrow = arrow_directory(located.identity)
    try:
        arrow.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"stream.in_memory=false: needs a folder for arrow files, and {arrow} cannot be made "
            f"({error}); set CL_BENCH_CACHE to a writable folder"
        ) from error
    return located.open(arrow)


def _encoded(
    splits: dict[str, Any],
    wanted: Wanted,
    grayscale: bool | None,
    image_size: Sequence[int] | None,
) -> dict[str, EncodedImages]:
    column = wanted.image_column
    form = choose_form(splits["train"][0][column], grayscale, image_size)
    return {name: EncodedImages(split, column, form) for name, split in splits.items()}


def _labels(splits: dict[str, EncodedImages], wanted: Wanted) -> dict[str, Tensor]:
    """int64 labels of both splits, and the number of classes."""
    column = wanted.label_column
    labels = {}
    for name, split in splits.items():
        values = split.cells.select_columns([column]).with_format("numpy")[:][column]
        if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
            kind = split.cells.features[column]
            raise UsageError(
                f"stream.label_column={column}: labels must be integers from 0, the {name} split "
                f"holds {kind}; cast the column to datasets.ClassLabel, or name another"
            )
        labels[f"{name}_labels"] = torch.from_numpy(values.astype(np.int64))
    feature = splits["train"].cells.features[column]
    declared = getattr(feature, "num_classes", None)
    count = int(labels["train_labels"].max()) + 1 if declared is None else declared
    return {**labels, "num_classes": torch.tensor(count)}


def _cached_moments(identity: str, images: Pixels) -> Moments:
    """:func:`measure`, which reads the whole training split, done once a data set."""

    def build() -> dict[str, Tensor]:
        moments = measure(images)
        values = {"mean": moments.mean, "std": moments.std}
        return {name: torch.tensor(v, dtype=torch.float64) for name, v in values.items()}

    found, _ = cached(f"{identity}-moments", build)
    return Moments(tuple(found["mean"].tolist()), tuple(found["std"].tolist()))
