"""Finding a labelled image data set: in a folder, or on the Hugging Face hub."""

import glob
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cl_bench.contracts.errors import UsageError
from cl_bench.contracts.randomness import generator
from cl_bench.data import cache_directory
from cl_bench.hub import hub_reachable
from cl_bench.tasks.images.idx import find_idx, open_idx

IMAGE_SUFFIXES = {
    ".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
}  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """Which data set, and how its rows are named.

    Attributes:
        dataset: hub id (``org/name``), used where ``data_dir`` is None.
        data_dir: folder with the data; then the hub is not asked.
        alternative: stream to propose where the data is missing, one that needs no download.
        revision: branch, tag or commit on the hub.
        config_name: configuration (subset) on the hub.
        image_column: name of the column with the images (hub, parquet).
        label_column: name of the column with the labels (hub, parquet).
        test_split: name of the split that serves as test data.
        aliases: other names of the image and the label column, (name, alias) pairs: copies of a
            data set differ in them.
        subfolder: where in ``data_dir`` the data is, for streams of several data sets.
        subfolders: all that such a stream looks for there.
        test_fraction: share of every class that is test data, in a folder of classes without
            splits; None refuses such a folder.
        split_seed: decides which.
    """

    dataset: str | None
    data_dir: str | None
    alternative: str
    revision: str | None = None
    config_name: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    test_split: str = "test"
    aliases: tuple[tuple[str, str], ...] = ()
    subfolder: str | None = None
    subfolders: tuple[str, ...] = ()
    test_fraction: float | None = None
    split_seed: int = 0

    @property
    def layout(self) -> str:
        """What ``data_dir`` must look like, in words."""
        test = self.test_split
        image, label = (
            " or ".join(map(repr, self.names(column)))
            for column in (self.image_column, self.label_column)
        )
        each = f"subfolders {', '.join(self.subfolders)}, each " if self.subfolders else ""
        return (
            f"a folder with {each}{'with ' if each else ''}train*.parquet and {test}*.parquet "
            f"(columns {image}, {label}), with train/<class>/*.png and {test}/<class>/*.png"
            f"{', with <class>/*.png' if self.test_fraction is not None else ''}, or "
            "with MNIST's four IDX files (train-images-idx3-ubyte.gz, ...)"
        )

    def names(self, column: str) -> list[str]:
        """``column`` and what else it may be called."""
        return [column, *(alias for name, alias in self.aliases if name == column)]

    def missing(self, reason: str) -> UsageError:
        """The error for data that is nowhere: what was looked for, what would do instead."""
        shown = "null" if self.data_dir is None else self.data_dir
        hub = f" The data set is {self.dataset!r} on the Hugging Face hub." if self.dataset else ""
        return UsageError(
            f"stream.data_dir={shown}: {reason}.{hub} Set stream.data_dir to {self.layout}; "
            f"or take data that needs no download: +stream={self.alternative}"
        )


@dataclass(frozen=True)
class Located:
    """A data set that is here.

    Attributes:
        identity: sha256 over its content (folders) or its revision (hub).
        source: where it came from, for the record.
        open: the ``train`` and ``test`` splits as ``datasets.Dataset`` with undecoded images. Takes
            a folder for arrow files (used for parquet).
    """

    identity: str
    source: str
    open: Callable[[Path], dict[str, Any]]


def locate(wanted: Wanted) -> Located:
    """Find the data, from ``data_dir`` if given and else from the hub.

    Raises:
        UsageError: at once, if it is not there: with the layout that is expected, what is there
            instead and an embedded stream to use.
    """
    if wanted.data_dir is not None:
        return _locate_folder(wanted, Path(wanted.data_dir).expanduser())
    if wanted.dataset is None:
        raise wanted.missing("neither stream.data_dir nor stream.dataset (a hub id) is set")
    return _locate_on_hub(wanted, wanted.dataset)


def _locate_folder(wanted: Wanted, folder: Path) -> Located:
    if not folder.is_dir():
        raise wanted.missing("no such folder")
    where = "there"
    if wanted.subfolder is not None:
        absent = [name for name in wanted.subfolders if not (folder / name).is_dir()]
        if absent:
            raise wanted.missing(f"has no subfolder {', '.join(absent)}")
        folder, where = folder / wanted.subfolder, f"in {wanted.subfolder}"
    splits = {"train": "train", "test": wanted.test_split}
    parquet = {k: sorted(folder.glob(f"{glob.escape(v)}*.parquet")) for k, v in splits.items()}
    if all(parquet.values()):
        files = [path for paths in parquet.values() for path in paths]
        return Located(
            _content_hash(folder, files),
            str(folder),
            lambda arrow: _open_parquet(parquet, wanted, arrow),
        )
    images = {k: _class_images(folder / v) for k, v in splits.items()}
    if all(images.values()):
        files = [path for paths in images.values() for path in paths]
        return Located(
            _content_hash(folder, files), str(folder), lambda _: _open_folders(images, wanted)
        )
    unsplit = _class_images(folder) if wanted.test_fraction is not None else []
    if unsplit:
        divided = _divided(unsplit, wanted)
        told = json.dumps([_content_hash(folder, unsplit), wanted.test_fraction, wanted.split_seed])
        return Located(
            hashlib.sha256(told.encode()).hexdigest(),
            str(folder),
            lambda _: _open_folders(divided, wanted),
        )
    if (idx := find_idx(folder)) is not None:
        files = [path for pair in idx.values() for path in pair]
        return Located(
            _content_hash(folder, files),
            str(folder),
            lambda _: open_idx(idx, wanted.image_column, wanted.label_column),
        )
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    raise wanted.missing(f"found {', '.join(names[:12]) or 'an empty folder'}{more} {where}")


def _class_images(split: Path) -> list[Path]:
    return sorted(path for path in split.glob("*/*") if path.suffix.lower() in IMAGE_SUFFIXES)


def _divided(images: list[Path], wanted: Wanted) -> dict[str, list[Path]]:
    """Of every class the same share for testing, at least one image, drawn by the seed."""
    found: dict[str, list[Path]] = {"train": [], "test": []}
    for name in sorted({path.parent.name for path in images}):
        own = [path for path in images if path.parent.name == name]
        if len(own) < 2:
            raise wanted.missing(f"class {name!r} has one image, too few to learn and test")
        order = torch.randperm(len(own), generator=generator(wanted.split_seed, "test", name))
        held = set(order[: max(1, int((wanted.test_fraction or 0) * len(own)))].tolist())
        found["test"] += [path for i, path in enumerate(own) if i in held]
        found["train"] += [path for i, path in enumerate(own) if i not in held]
    return found


def _content_hash(folder: Path, files: list[Path]) -> str:
    """Sha256 over relative names and contents: a copy elsewhere has an equal one."""

    def of(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(4) as pool:
        hashes = pool.map(of, files)
        named = [(path.relative_to(folder).as_posix(), sha) for path, sha in zip(files, hashes)]  # noqa: B905
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def _open_parquet(files: dict[str, list[Path]], wanted: Wanted, arrow: Path) -> dict[str, Any]:
    import datasets

    names = {split: [glob.escape(str(p)) for p in paths] for split, paths in files.items()}
    try:
        declared = {
            split: {str(_class_names(path, wanted)) for path in paths}
            for split, paths in files.items()
        }
        # One by one: together, all splits would get the first one's class names.
        found = {
            split: datasets.load_dataset(
                "parquet", data_files={split: paths}, split=split, cache_dir=str(arrow)
            )
            for split, paths in names.items()
        }
    except Exception as error:  # whatever Arrow says about a broken file, the user can mend it
        raise wanted.missing(f"the parquet files there cannot be read ({_brief(error)})") from error
    for split, kinds in declared.items():
        if len(kinds) > 1:
            raise UsageError(
                f"stream.label_column={wanted.label_column}: the {split} files there name their "
                "classes differently from one another; write them anew with the same names"
            )
    return {split: _undecoded(found[split], wanted) for split in files}


def _class_names(path: Path, wanted: Wanted) -> Any:
    """What a parquet file of ``datasets`` calls the classes of its label column; None without."""
    import datasets
    import pyarrow.parquet

    features = datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(path))
    column = next((name for name in wanted.names(wanted.label_column) if name in features), None)
    return getattr(features[column], "names", None) if column else None


def _open_folders(files: dict[str, list[Path]], wanted: Wanted) -> dict[str, Any]:
    import datasets

    names = sorted({path.parent.name for path in files["train"]}, key=natural)
    unknown = sorted({path.parent.name for path in files["test"]} - set(names))
    if unknown:
        raise wanted.missing(f"{wanted.test_split}/ has classes that train/ lacks: {unknown}")
    features = datasets.Features(
        {
            wanted.image_column: datasets.Image(decode=False),
            wanted.label_column: datasets.ClassLabel(names=names),
        }
    )
    return {
        split: datasets.Dataset.from_dict(
            {
                wanted.image_column: [str(path) for path in paths],
                wanted.label_column: [names.index(path.parent.name) for path in paths],
            },
            features=features,
        )
        for split, paths in files.items()
    }


def natural(name: str) -> tuple[list[str | int], str]:
    """Sorts numbers inside names by their value: 2 before 10."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def _locate_on_hub(wanted: Wanted, dataset: str) -> Located:
    if Path(dataset).exists():
        raise UsageError(
            f"stream.dataset={dataset}: this is a local path; use stream.data_dir={dataset}"
        )
    import datasets

    reachable = not datasets.config.HF_HUB_OFFLINE and hub_reachable()
    try:
        with _offline(not reachable):
            found = datasets.load_dataset(dataset, wanted.config_name, revision=wanted.revision)
    except Exception as error:  # network, spelling, access, configuration: all for the user
        where = "" if reachable else "; the hub cannot be reached from here"
        raise wanted.missing(f"{dataset} cannot be loaded ({_brief(error)}{where})") from error
    for split in ("train", wanted.test_split):
        if split not in found:
            remedy = "name one of them in stream.test_split; training data must be called 'train'"
            raise UsageError(f"stream.dataset={dataset}: has splits {sorted(found)}; {remedy}")
    if not reachable and wanted.revision is not None:
        _check_cached_revision(wanted, found["train"])
    splits = {"train": found["train"], "test": found[wanted.test_split]}
    prints = [dataset, wanted.config_name, *(split._fingerprint for split in splits.values())]
    return Located(
        hashlib.sha256(json.dumps(prints).encode()).hexdigest(),
        dataset + (f"@{wanted.revision}" if wanted.revision else ""),
        lambda _: {name: _undecoded(split, wanted) for name, split in splits.items()},
    )


@contextmanager
def _offline(offline: bool) -> Iterator[None]:
    """Let ``datasets`` go straight to its own cache."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _check_cached_revision(wanted: Wanted, split: Any) -> None:
    # Offline, datasets takes whichever revision it downloaded last.
    parts = [Path(file["filename"]).parent.name for file in split.cache_files]
    if wanted.revision not in parts:
        raise wanted.missing(
            f"the hub cannot be reached and the local copy of {wanted.dataset} is not known to be "
            f"stream.revision={wanted.revision} (it is {', '.join(parts)}); give the commit hash"
        )


def _undecoded(split: Any, wanted: Wanted) -> Any:
    import datasets

    for key, column in (
        ("image_column", wanted.image_column),
        ("label_column", wanted.label_column),
    ):
        found = next((name for name in wanted.names(column) if name in split.features), column)
        if found != column:
            split = split.rename_column(found, column)
        if column not in split.features:
            raise UsageError(f"stream.{key}={column}: the data has columns {split.column_names}")
    split = split.select_columns(sorted({wanted.image_column, wanted.label_column}))
    try:
        return split.cast_column(wanted.image_column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UsageError(
            f"stream.image_column={wanted.image_column}: holds no images ({_brief(error)})"
        ) from error


def arrow_directory(identity: str) -> Path:
    """Where the arrow files of a data set stay that is decoded on fetch."""
    return cache_directory() / "arrow" / identity[:32]


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
