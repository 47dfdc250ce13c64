"""Rows of files, folders, the hub or Python, each with the place that a message names."""

import gzip
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from cl_bench.contracts.errors import UsageError
from cl_bench.hub import hub_reachable

LONGEST = 16 * 2**20
"""Bytes of the longest line: no text that a model reads is longer."""

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")

FILES = (".jsonl", ".gz", ".parquet", ".json", ".csv", ".txt")
"""Endings that no id on the hub has; the first three are read."""

SIDES = ("train", "validation", "test")


@dataclass(frozen=True)
class Row:
    """A row as it was written.

    Attributes:
        place: file and row, counted from 1.
        fields: its values by name.
    """

    place: str
    fields: Mapping[str, Any]


def read_rows(path: str, name: str | None, split: str | None, key: str) -> dict[str, list[Row]]:
    """Rows by ``train``, ``validation`` and ``test``, as far as the source tells them apart.

    Args:
        path: a file, a folder, or an id on the hub.
        name: of a configuration on the hub.
        split: whose rows are learned; None for ``train``, or whatever there is.
        key: says the path, in messages: ``stream.data[0].path``.

    Raises:
        UsageError: there is nothing to read, or something that is not a row.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        return _folder(place, split, key)
    if place.exists() or place.suffix.lower() in FILES:  # ids on the hub have points, too
        if not place.is_file():
            raise UsageError(f"{key}={path}: no such file")
        _refuse_split(split, key)
        return {"train": read_file(place, key)}
    return _hub(path, name, split, key)


def given_rows(data: Iterable[Mapping[str, Any]], name: str) -> list[Row]:
    """Rows that are at hand in Python: a list, or a data set of the package datasets."""
    names = _class_names(getattr(data, "features", None))
    found = [Row(f"{name}: row {i}", _named(row, names)) for i, row in enumerate(data, 1)]
    return _some(found, name)


def read_file(path: Path, key: str) -> list[Row]:
    """All rows of one file."""
    if path.suffix == ".parquet":
        return _some(_parquet(path), str(path))
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _some(list(_lines(path)), str(path))
    raise UsageError(f"{key}={path}: not one of {', '.join(SUFFIXES)}")


def _some(rows: list[Row], name: str) -> list[Row]:
    if not rows:
        raise UsageError(f"{name}: holds no rows; leave it out, or fill it")
    return rows


def _lines(path: Path) -> Iterator[Row]:
    where = f"{path}: row"
    number = 0
    opened: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            while line := file.readline(LONGEST + 1):
                number += 1
                if len(line) > LONGEST:
                    raise UsageError(
                        f"{where} {number}: longer than {LONGEST // 2**20} MB, which no text for a "
                        "model is; write one JSON object a line"
                    )
                if line.strip():
                    yield Row(f"{where} {number}", _object(line, f"{where} {number}"))
    except (OSError, EOFError) as error:
        raise UsageError(f"{where} {number + 1}: cannot be read ({error}); get it again") from error


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: not UTF-8 ({error.reason}); save it as UTF-8") from None
    except RecursionError:
        raise UsageError(f"{where}: nested too deeply; write a flat JSON object") from None
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{where}: no JSON ({error.msg} at character {error.pos + 1}); write one object a line"
        ) from None
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{where}: {type(found).__name__}, not a JSON object; write {{...}}")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no value that a model can read; write a text in its place")


def _parquet(path: Path) -> list[Row]:
    import datasets
    import pyarrow.parquet

    try:
        features = datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(path))
        table = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(f"{path}: no parquet file ({reason}); get it again") from error
    names = _class_names(features)
    return [Row(f"{path}: row {i}", _named(row, names)) for i, row in enumerate(table, 1)]


def _class_names(features: Any) -> dict[str, list[str]]:
    """What numbers in a column stand for, where a data set says so."""
    columns = dict(features or {}).items()
    return {c: list(f.names) for c, f in columns if getattr(f, "names", None)}


def _named(row: Mapping[str, Any], names: Mapping[str, list[str]]) -> dict[str, Any]:
    found = dict(row)
    for column, texts in names.items():
        value = found.get(column)
        if isinstance(value, int) and 0 <= value < len(texts):
            found[column] = texts[value]
    return found


def _folder(folder: Path, split: str | None, key: str) -> dict[str, list[Row]]:
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name.endswith(SUFFIXES))
    if not files:
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:12])
        raise UsageError(
            f"{key}={folder}: holds none of {', '.join(SUFFIXES)}; there are {there or 'no files'}"
        )
    of = {side: [p for p in files if p.name.startswith(side)] for side in SIDES}
    if split is not None:
        of["train"] = [p for p in files if p.name.startswith(split)]
        if not of["train"]:
            names = ", ".join(p.name for p in files)
            raise UsageError(f"{key}={folder}: no file is called {split}*; there are {names}")
    elif not of["train"]:
        if of["validation"] or of["test"]:
            names = ", ".join(p.name for p in files)
            raise UsageError(f"{key}={folder}: no file is called train*; there are {names}")
        of["train"] = files  # parts of one data set, which has no splits
    return {
        side: [row for path in paths for row in read_file(path, key)]
        for side, paths in of.items()
        if paths
    }


def _refuse_split(split: str | None, key: str) -> None:
    if split is not None:
        raise UsageError(
            f"{key.removesuffix('path')}split={split}: a file has no splits; leave it out"
        )


def _hub(dataset: str, name: str | None, split: str | None, key: str) -> dict[str, list[Row]]:
    import datasets

    reachable = not datasets.config.HF_HUB_OFFLINE and hub_reachable()
    try:
        found = datasets.load_dataset(dataset, name)
        wanted = {"train": split or "train", "validation": "validation", "test": "test"}
        there = {side: found[s] for side, s in wanted.items() if s in found}
        if "train" not in there:
            raise ValueError(f"there is no split {wanted['train']}, but {', '.join(found)}")
    except Exception as error:  # network, spelling, access: all for the user
        where = "" if reachable else "; the hub cannot be reached from here"
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"{key}={dataset}: no such file or folder, and as a data set on the hub it cannot be "
            f"read ({reason}{where})"
        ) from error
    return {side: given_rows(rows, f"{dataset} {side}") for side, rows in there.items()}


def is_missing(value: Any) -> bool:
    """Null, or a number that is none."""
    return value is None or (isinstance(value, float) and not math.isfinite(value))
