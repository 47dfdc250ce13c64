"""Loading a labelled image data set as an :class:`ImageSource`."""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl_bench.contracts.errors import UsageError
from cl_bench.contracts.stream import Origin
from cl_bench.data import cached
from cl_bench.tasks.images.decode import EncodedImages, choose_form
from cl_bench.tasks.images.files import Located, Wanted, arrow_directory, locate
from cl_bench.tasks.images.labels import read_labels
from cl_bench.tasks.images.source import ImageSource, Moments, Pixels, measure


def load_images(
    wanted: Wanted,
    *,
    licence: str,
    citation: str,
    grayscale: bool | None = None,
    image_size: Sequence[int] | None = None,
    moments: Moments | None = None,
    in_memory: bool = True,
    renumber: bool = False,
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
        renumber: count the labels that occur in training from 0, in their order.

    Raises:
        UsageError: if the data is missing, or does not fit the arguments.
    """
    located = locate(wanted)
    choices = [wanted.image_column, wanted.label_column, wanted.test_split, grayscale, image_size]
    choices += [renumber] if renumber else []
    identity = hashlib.sha256(json.dumps([2, located.identity, *choices]).encode()).hexdigest()
    train: Pixels
    test: Pixels
    names: list[list[str]] = []
    if in_memory:

        def decode() -> dict[str, Tensor]:
            with tempfile.TemporaryDirectory(prefix="cl_bench_") as arrow:
                splits = _encoded(located.open(Path(arrow)), wanted, grayscale, image_size)
                labels, found = read_labels(_cells(splits), wanted.label_column, renumber)
                names.append(found)
                return {
                    "train": splits["train"].decode_all(),
                    "test": splits["test"].decode_all(),
                    **labels,
                }

        data, fingerprint = cached(identity, decode)
        train, test = data["train"], data["test"]
        _, channels, height, width = data["train"].shape
    else:
        splits = _encoded(_open_kept(located, wanted), wanted, grayscale, image_size)
        (data, found), fingerprint = (
            read_labels(_cells(splits), wanted.label_column, renumber),
            identity,
        )
        names.append(found)
        train, test = splits["train"], splits["test"]
        channels, height, width = splits["train"].form.shape
    return ImageSource(
        train=train,
        train_labels=data["train_labels"],
        test=test,
        test_labels=data["test_labels"],
        shape=(channels, height, width),
        num_classes=int(data["num_classes"]),
        class_names=names[0] if names else _cached_names(identity, located, wanted, renumber),
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
    root = None if wanted.data_dir is None else Path(wanted.data_dir).expanduser()
    form = choose_form(splits["train"][0][column], grayscale, image_size, root)
    return {name: EncodedImages(split, column, form, root) for name, split in splits.items()}


def _cells(splits: dict[str, EncodedImages]) -> dict[str, Any]:
    return {name: split.cells for name, split in splits.items()}


def _cached_names(identity: str, located: Located, wanted: Wanted, renumber: bool) -> Sequence[str]:
    """Names of the classes of data that was decoded by an earlier run."""

    def build() -> dict[str, Tensor]:
        with tempfile.TemporaryDirectory(prefix="cl_bench_") as arrow:
            splits = located.open(Path(arrow))
            _, names = read_labels(splits, wanted.label_column, renumber)
        return {"names": torch.tensor(list(json.dumps(names).encode()), dtype=torch.uint8)}

    found, _ = cached(f"{identity}-names", build)
    names: list[str] = json.loads(bytes(found["names"].tolist()))
    return names


def _cached_moments(identity: str, images: Pixels) -> Moments:
    """:func:`measure`, which reads the whole training split, done once a data set."""

    def build() -> dict[str, Tensor]:
        moments = measure(images)
        values = {"mean": moments.mean, "std": moments.std}
        return {name: torch.tensor(v, dtype=torch.float64) for name, v in values.items()}

    found, _ = cached(f"{identity}-moments", build)
    return Moments(tuple(found["mean"].tolist()), tuple(found["std"].tolist()))
