"""The files of a run's directory: their names, and how they are written whole or not at all."""

import contextlib
import csv
import errno
import hashlib
import io
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from cl_bench.contracts import UsageError

RESULTS, MATRIX, SUMMARY, LOCK = "results.jsonl", "accuracy_matrix.csv", "summary.json", "run.lock"
CONFIG, LAYERS, GENERAL = "config.yaml", "layers.csv", "general.csv"
COMMAND, CHOICES, RESUMES = "command.txt", "choices.json", "resumes.jsonl"
ENVIRONMENT, DATA = "environment.json", "data.json"

MOST = 256 * 2**20
"""Bytes of a text file that are read: a run of millions of events stays below."""

NO_LINKS = getattr(os, "O_NOFOLLOW", 0)
"""For :func:`os.open`: a name that is a symbolic link is refused, not followed."""

FOLDERS = ("checkpoints", "weights", "export")
"""Folders of a run whose files are read, replaced or deleted."""


def write_atomically(path: Path, content: bytes | Callable[[IO[bytes]], None]) -> None:
    """Put ``content`` in place of whatever ``path`` held: a reader sees the old or the new, whole.

    Args:
        path: of the file.
        content: bytes, or what writes them to an empty file.

    Raises:
        UsageError: the file system refuses, for example because it is full.
    """
    # Not to be guessed, and never there before: a link that lies in wait is not written through.
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    with explained(path):
        try:
            descriptor = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_LINKS, 0o666)
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


def append_line(path: Path, text: str) -> None:
    """Add a line to a file, whole or not at all; half a line that was left there stays apart.

    Raises:
        UsageError: the disk refuses.
    """
    with explained(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | NO_LINKS, 0o666)
        try:
            end = os.lseek(descriptor, 0, os.SEEK_END)
            os.lseek(descriptor, -min(end, 1), os.SEEK_END)
            apart = b"" if os.read(descriptor, 1) in (b"", b"\n") else b"\n"
            try:
                write(descriptor, apart + text.encode() + b"\n")
                os.fsync(descriptor)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, end)
                raise
        finally:
            os.close(descriptor)


def forget_scratch(directory: Path) -> None:
    """Delete what writers of a directory's files left half written when they were killed."""
    for stray in directory.glob(".*.tmp"):
        delete(stray)


def make_directory(path: Path) -> None:
    """Make a directory and its parents; raises :class:`UsageError` where the disk refuses."""
    with explained(path):
        path.mkdir(parents=True, exist_ok=True)


def delete(path: Path) -> None:
    """Delete a file if it is there; raises :class:`UsageError` where the disk refuses."""
    with explained(path):
        path.unlink(missing_ok=True)


def delete_folder(path: Path) -> None:
    """Delete a folder of plain files; raises :class:`UsageError` where the disk refuses."""
    with explained(path):
        shutil.rmtree(path)


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


def open_file(path: Path) -> IO[bytes]:
    """Open a file of a run for reading.

    Raises:
        FileNotFoundError: it is not there.
        UsageError: it is a symbolic link, a pipe or a device, or cannot be opened: what a run
            wrote is a plain file, and reading another might wait for ever, or show a file of
            somebody else's choice.
    """
    try:
        # Without O_NONBLOCK a pipe would be waited for before it can be told from a file.
        descriptor = os.open(path, os.O_RDONLY | NO_LINKS | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise
    except OSError as error:
        if path.is_symlink():
            raise _not_plain(path) from None
        raise UsageError(f"cannot read {path} ({error.strerror or error})") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_plain(path)
    return os.fdopen(descriptor, "rb")


def _not_plain(path: Path) -> UsageError:
    return UsageError(
        f"{path} is no plain file or folder but a symbolic link, a pipe or a device: it is not "
        "followed, and nothing was changed; put what it stands for in its place"
    )


def require_plain(directory: Path) -> None:
    """Raise :class:`UsageError` if a run's directory holds links, pipes or devices.

    What a link points to would be read, replaced or deleted as if it were the run's. The directory
    itself may be reached through a link; ``wandb`` makes links in its own folder, which only it
    uses.
    """
    for folder in (directory, *(directory / name for name in FOLDERS)):
        with (
            contextlib.suppress(FileNotFoundError, NotADirectoryError),
            os.scandir(folder) as found,
        ):
            for entry in found:
                mode = entry.stat(follow_symlinks=False).st_mode
                if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                    raise _not_plain(Path(entry.path))


def read_bytes(path: Path) -> bytes:
    """All of a text file of a run; raises as :func:`open_file`, and where it is too large."""
    with open_file(path) as file:
        content = file.read(MOST + 1)
    if len(content) > MOST:
        raise UsageError(f"{path} is larger than {MOST >> 20} MiB: no run writes that")
    return content


def read_required(path: Path) -> bytes:
    """All of a text file that every run has.

    Raises:
        UsageError: as :func:`open_file`, and where there is no such run or file.
    """
    try:
        return read_bytes(path)
    except FileNotFoundError:
        if (path.parent / CONFIG).exists() and path.name not in (RESULTS, MATRIX):
            raise UsageError(f"{path} is missing; {PUT_BACK}") from None
        what = "has no results yet" if (path.parent / CONFIG).exists() else "holds no run"
        raise UsageError(
            f"{path.parent} {what} ({path.name} is missing): give the directory of a run"
        ) from None


def read_text(path: Path) -> str:
    """All of a text file of a run, as text; raises :class:`UsageError` if it is not UTF-8, too."""
    try:
        return read_required(path).decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is damaged: it is not UTF-8 ({error}); {PUT_BACK}") from None


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file of a run; None if the file is not there.

    Raises:
        UsageError: it cannot be read, or is no object.
    """
    try:
        found = json.loads(read_bytes(path))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        said = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UsageError(f"{path} is damaged: it is not JSON ({said}); {PUT_BACK}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path} is damaged: it holds no JSON object; {PUT_BACK}")
    return found


PUT_BACK = "put back a copy of the file as it was"


def to_json(value: Mapping[str, Any], indent: int | None = None) -> str:
    """JSON; a number that is not finite is null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    """``value`` with plain numbers, and None for those that JSON does not know."""
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


def digest(content: bytes) -> str:
    """SHA-256, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()
