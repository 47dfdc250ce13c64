"""Checkpoint files: whole or not there, checked when read, a few of them kept.

A file is what ``torch.save`` writes, loadable anywhere with ``torch.load(..., weights_only=True)``.
It is a zip archive, whose comment holds the SHA-256 of everything before it: a file that was cut
short or changed since does not pass for a checkpoint.

Tensors of which processes hold rows lie in a folder beside it, in safetensors files of which each
process has written one. The file is written last and names them and their hashes; those of where a
task began stand in its first folder, for all of its checkpoints.
"""

import hashlib
import re
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import torch
from torch import Tensor

from cl_bench.contracts import State, UsageError
from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import Count, OnlyWith
from cl_bench.experiment.weights import TaskWeights
from cl_bench.parallel.ranks import rank
from cl_bench.parallel.stored import Stored, found_rows, leaf_by_leaf, resolved, taken_out
from cl_bench.parallel.stored import write as write_rows
from cl_bench.tracking.aside import Aside
from cl_bench.tracking.files import (
    delete,
    delete_folder,
    make_directory,
    open_file,
    write_atomically,
)

FORMAT = 2
WITH_ROWS = 3
"""Of those beside which a folder lies, with what processes share out."""
ROWS = ".rows"

MARK = b"sha256:"
COMMENT_LENGTH = len(MARK) + 64

ENABLED = OnlyWith("enabled", (True,))


@checked("checkpoint.")
@dataclass(frozen=True)
class CheckpointSettings:
    """When checkpoints are written.

    Attributes:
        enabled: write any at all.
        every_steps: optimizer steps between two of them inside a task; None leaves those at the
            end of each task.
        keep: how many of the newest stay.
        weights: after which tasks the network's weights alone stay, for ``export=``: after ``all``,
            each in a file of its own, or after the ``last``, whose checkpoint stays anyway.
    """

    enabled: bool = True
    every_steps: Annotated[Count | None, ENABLED] = 5000
    keep: Annotated[Count, ENABLED] = 2
    weights: Annotated[Literal["all", "last"], ENABLED] = "all"


class DamagedError(Exception):
    """A checkpoint file is not what was written; the message says how that shows."""


@dataclass(frozen=True)
class Checkpoint:
    """One that was read.

    Attributes:
        path: of the file.
        state: what it holds.
    """

    path: Path
    state: State

    @property
    def position(self) -> int:
        """Bytes of the record that it knows of."""
        return int(self.state["position"])

    @property
    def chain(self) -> str | None:
        """Of the record up to :attr:`position`; None in those of older versions."""
        return self.state.get("chain")


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: of the run; files go to ``checkpoints`` in it.
        settings: how many stay.
        writes: whether this process writes, and deletes; any may read.
        apart: whether processes share weights out: what is read leaves in its files what they hold
            rows of.

    Attributes:
        seconds: spent on writing them, and weights.
        rows: hashes of the files in each folder that may be asked for again.
        weights: of the network, kept beside them.
    """

    def __init__(
        self,
        directory: Path,
        settings: CheckpointSettings,
        writes: bool = True,
        apart: bool = False,
    ) -> None:
        self.directory = directory / "checkpoints"
        self.writes = writes
        self.apart = apart
        self.rows: dict[str, dict[str, str]] = {}
        self.settings = settings
        self.seconds = 0.0
        self.weights = TaskWeights(directory)

    def paths(self) -> list[Path]:
        """All of them, the oldest first."""
        return sorted(self.directory.glob("task*-step*.pt"))

    def save(self, task: int, step: int, state: State) -> State:
        """Write a checkpoint, then let go of the oldest; all processes together.

        Args:
            task: index of the task it belongs to.
            step: optimizer steps taken in the task.
            state: tensors and plain values.

        Returns:
            ``state``, with a :class:`~cl_bench.parallel.stored.Stored` for what processes share
            out.

        Raises:
            UsageError: the disk takes no more; the checkpoints before stay.
        """
        begun = time.perf_counter()
        path = self.directory / f"task{task:04}-step{step:09}.pt"
        if self.writes:
            make_directory(self.directory)
        state, shared = taken_out(state, path.with_suffix(ROWS))
        if shared:
            self.rows[path.stem + ROWS] = write_rows(path.with_suffix(ROWS), shared)
        if self.writes:
            content = self._naming_rows(state)
            write_atomically(path, lambda file: write_checkpoint(file, content))
            self._let_go()
        self.seconds += time.perf_counter() - begun
        return state

    def _naming_rows(self, state: State) -> State:
        """What the file holds."""
        folders: set[str] = set()

        def plain(leaf: Any, _: str) -> Any:
            if not isinstance(leaf, Stored):
                return leaf
            folders.add(leaf.folder.name)
            return leaf.plain()

        content: State = leaf_by_leaf(state, plain)
        if not folders:
            return state
        self.rows = {name: self.rows[name] for name in sorted(folders)}
        return {**content, "format": WITH_ROWS, "rows": self.rows}

    def _let_go(self) -> None:
        """Delete the oldest that are more than stay, and folders that no other needs."""
        paths = self.paths()
        for old in paths[: -self.settings.keep]:
            delete(old)
        kept = {path.stem for path in paths[-self.settings.keep :]}
        begun = {f"{stem.partition('-')[0]}-step{0:09}" for stem in kept}
        for folder in self._folders():
            if folder.stem not in kept | begun:
                delete_folder(folder)

    def _folders(self) -> list[Path]:
        return sorted(self.directory.glob(f"task*-step*{ROWS}"))

    def save_weights(self, learned: int, weights: Mapping[str, Tensor]) -> bytes | None:
        """Keep the network's weights after ``learned`` tasks, if they are wanted.

        Returns:
            What was written to the file; None where nothing was.

        Raises:
            UsageError: the disk takes no more; the files before stay.
        """
        if not self.writes or self.settings.weights != "all":
            return None
        begun = time.perf_counter()
        content = self.weights.save(learned, weights)
        self.seconds += time.perf_counter() - begun
        return content

    def newest(
        self, against: Callable[[Checkpoint], str | None], say: Callable[[str], None]
    ) -> Checkpoint | None:
        """The newest checkpoint that can be used; None if there is none.

        Args:
            against: what speaks against an undamaged one, or None.
            say: told about every one that is passed over.

        Raises:
            UsageError: one cannot be read just now, or by this version. Nothing is wrong with it,
                so none before it is taken in its place.
        """
        for path in reversed(self.paths()):
            try:
                found = self.read(path)
            except DamagedError as damage:
                say(f"checkpoint {path} is damaged ({damage})")
                continue
            reason = against(found)
            if reason is None:
                return found
            say(f"checkpoint {path} cannot be used ({reason})")
        return None

    def read(self, path: Path) -> Checkpoint:
        """One of them; raises as :func:`read_checkpoint`."""
        found = Checkpoint(path, read_checkpoint(path, self.apart))
        self.rows = dict(found.state.get("rows", {}))
        return found

    def set_aside_after(self, found: Checkpoint | None, aside: Aside) -> None:
        """Move away what is newer than ``found``; None moves all. Unfinished files are deleted."""
        if not self.writes:
            return
        for stray in self.directory.glob(".task*.tmp"):
            delete_folder(stray) if stray.is_dir() else delete(stray)
        for other in (*self.paths(), *self._folders()):
            if found is None or other.stem > found.path.stem:
                aside.take(other)
        self.weights.set_aside_after(int(found.state["task"]) if found else -1, aside)
        self._let_go()  # a kill may have come between writing one and that


class _Hashing:
    """Writes through to a file, and hashes what passes."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        self.digest.update(content)
        try:
            return self.file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def write_checkpoint(file: IO[bytes], state: State) -> None:
    """Write ``state`` and its hash to an empty binary file that can seek."""
    hashing = _Hashing(file)
    try:
        torch.save(state, hashing)  # type: ignore[arg-type]
    except RuntimeError:
        # torch reports a full disk as a position that it did not expect.
        if hashing.error is not None:
            raise hashing.error from None
        raise
    # The archive ends with the length of its comment, zero so far.
    file.seek(-2, 2)
    file.write(struct.pack("<H", COMMENT_LENGTH))
    file.write(MARK + hashing.digest.hexdigest().encode())


def read_checkpoint(path: Path, apart: bool = False) -> State:
    """What :func:`write_checkpoint` wrote.

    Args:
        path: of the file.
        apart: leave in their files, as :class:`~cl_bench.parallel.stored.Stored`, tensors of which
            processes hold rows; process 0 alone looks whether these are as they were written.

    Raises:
        DamagedError: the file is not as it was written, or one of those beside it.
        UsageError: it is, but cannot be read just now or by this version: memory, permissions, a
            disk that is not there, another format.
    """
    try:
        _verify(path)
        # Not to where it was written: every process would take its checkpoint to one device.
        state: State = torch.load(path, map_location="cpu", weights_only=True)
        if state.get("format") == WITH_ROWS:
            if rank() == 0 or not apart:
                _verify_rows(path.parent, state["rows"])
            state = found_rows(state, path.parent)
            state = state if apart else resolved(state)
    except DamagedError:
        raise
    except Exception as error:  # the contents are those that were written: it is not the file's
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(f"cannot read the checkpoint {path} now ({said[0]})") from error
    if state.get("format") not in (FORMAT, WITH_ROWS):
        raise UsageError(
            f"the checkpoint {path} has format {state.get('format')}, and this version of cl_bench "
            f"reads {FORMAT} and {WITH_ROWS}: use the version that wrote it (environment.json says "
            "which)"
        )
    return state


def _verify_rows(directory: Path, rows: Mapping[str, Mapping[str, str]]) -> None:
    for folder, files in rows.items():
        place = directory / Path(folder).name
        there = {found.name for found in place.glob("*")} if place.is_dir() else set()
        if there != files.keys():
            odd = sorted(there ^ files.keys())[0]
            raise DamagedError(f"{place} {'lacks' if odd in files else 'has besides'} {odd}")
        for name, told in files.items():
            with open_file(place / name) as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != told:  # type: ignore[arg-type]
                    raise DamagedError(f"the contents of {place / name} have changed")


def _verify(path: Path) -> None:
    size = path.stat().st_size
    body = size - COMMENT_LENGTH - 2
    if body < 0:
        raise DamagedError(f"only {size} bytes long")
    digest = hashlib.sha256()
    with open_file(path) as file:
        while body and (piece := file.read(min(body, 1 << 20))):
            digest.update(piece)
            body -= len(piece)
        end = file.read()
    digest.update(b"\0\0")
    if end != struct.pack("<H", COMMENT_LENGTH) + MARK + digest.hexdigest().encode():
        cut = not re.search(re.escape(MARK) + rb"[0-9a-f]{64}\Z", end)
        raise DamagedError("it ends too early" if cut else "its contents have changed")
