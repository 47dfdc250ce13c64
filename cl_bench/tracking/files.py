"""The files of a run's directory: their names, and how they are written whole or not at all."""

import contextlib
import csv
import errno
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from cl_bench.contracts import UsageError

RESULTS, MATRIX, SUMMARY, LOCK = "results.jsonl", "accuracy_matrix.csv", "summary.json", "run.lock"
CONFIG, LAYERS = "config.yaml", "layers.csv"
COMMAND, CHOICES, RESUMES = "command.txt", "choices.json", "resumes.jsonl"
ENVIRONMENT, DATA = "environment.json", "data.json"


def write_atomically(path: Path, content: bytes | Callable[[IO[bytes]], None]) -> None:
    """Put ``content`` in place of whatever ``path`` held: a reader sees the old or the new, whole.

    Args:
        path: of the file.
        content: bytes, or what writes them to an empty file.

    Raises:
        UsageError: the file system refuses, for example because it is full.
    """
    # One writer per directory (the lock), so a fixed name leaves at most one stray file.
    scratch = path.with_name(f".{path.name}.tmp")
    with explained(path):
        try:
            descriptor = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                if isinstance(content, bytes):
                    write(descriptor, content)
                else:
                    with os.fdopen(descriptor, "w+b", closefd=False) as file:
                        content(file)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            scratch.replace(path)
            _sync_directory(path.parent)
        except OSError:
            with contextlib.suppress(OSError):
                scratch.unlink()
            raise


def make_directory(path: Path) -> None:
    """Make a directory and its parents; raises :class:`UsageError` where the disk refuses."""
    with explained(path):
        path.mkdir(parents=True, exist_ok=True)


def delete(path: Path) -> None:
    """Delete a file if it is there; raises :class:`UsageError` where the disk refuses."""
    with explained(path):
        path.unlink(missing_ok=True)


def _sync_directory(path: Path) -> None:
    """A name in a directory is lost in a power failure until the directory is on disk too."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into a :class:`UsageError` with a remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = (
                "free some space or give run_dir=... on another disk; "
                "what was recorded before is intact"
            )
        else:
            remedy = "give run_dir=... where you may write"
        raise UsageError(f"cannot write {path} ({error.strerror or error}): {remedy}") from error


def write(descriptor: int, content: bytes) -> None:
    """All of it: the system may take less at a time."""
    while content:
        content = content[os.write(descriptor, content) :]


def read_bytes(path: Path) -> bytes:
    """What a file of a run holds.

    Raises:
        UsageError: there is no such run or file, or it cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        if (path.parent / CONFIG).exists() and path.name not in (RESULTS, MATRIX):
            raise UsageError(f"{path} is missing; {PUT_BACK}") from None
        what = "has no results yet" if (path.parent / CONFIG).exists() else "holds no run"
        raise UsageError(
            f"{path.parent} {what} ({path.name} is missing): give the directory of a run"
        ) from None
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror or error})") from None


def read_text(path: Path) -> str:
    """The same as text.

    Raises:
        UsageError: as :func:`read_bytes`, or it is not UTF-8.
    """
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is damaged: it is not UTF-8 ({error}); {PUT_BACK}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a run.

    Raises:
        UsageError: as :func:`read_text`, or it holds none.
    """
    try:
        found = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is damaged: it is not JSON ({error}); {PUT_BACK}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path} is damaged: it holds no JSON object; {PUT_BACK}")
    return found


PUT_BACK = "put back a copy of the file as it was"


def to_json(value: Mapping[str, Any], indent: int | None = None) -> str:
    """JSON; a number that is not finite is null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    """The same with plain numbers, and None for those that JSON does not know."""
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_csv(header: Sequence[str], rows: Iterator[list[Any]]) -> bytes:
    """A table as a file holds it."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode()


def to_cell(value: Any) -> Any:
    """A number with all its digits; nothing for NaN."""
    if isinstance(value, float):
        return "" if math.isnan(value) else repr(float(value))
    return value
