"""Checkpoint files: whole or not there, checked when read, a few of them kept.

A file is what ``torch.save`` writes, loadable anywhere with ``torch.load(..., weights_only=True)``.
It is a zip archive, whose comment holds the SHA-256 of everything before it: a file that was cut
short or changed since does not pass for a checkpoint.
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
from cl_bench.tracking.aside import Aside
from cl_bench.tracking.files import delete, make_directory, open_file, write_atomically

FORMAT = 2

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

    Attributes:
        seconds: spent on writing them, and weights.
        weights: of the network, kept beside them.
    """

    def __init__(self, directory: Path, settings: CheckpointSettings, writes: bool = True) -> None:
        self.directory = directory / "checkpoints"
        self.writes = writes
        self.settings = settings
        self.seconds = 0.0
        self.weights = TaskWeights(directory)

    def paths(self) -> list[Path]:
        """All of them, the oldest first."""
        return sorted(self.directory.glob("task*-step*.pt"))

    def save(self, task: int, step: int, state: State) -> None:
        """Write a checkpoint, then let go of the oldest.

        Args:
            task: index of the task it belongs to.
            step: optimizer steps taken in the task.
            state: tensors and plain values.

        Raises:
            UsageError: the disk takes no more; the checkpoints before stay.
        """
        if not self.writes:
            return
        begun = time.perf_counter()
        path = self.directory / f"task{task:04}-step{step:09}.pt"
        make_directory(self.directory)
        write_atomically(path, lambda file: write_checkpoint(file, state))
        self._let_go()
        self.seconds += time.perf_counter() - begun

    def _let_go(self) -> None:
        """Delete the oldest that are more than stay."""
        for old in self.paths()[: -self.settings.keep]:
            delete(old)

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
                found = Checkpoint(path, read_checkpoint(path))
            except DamagedError as damage:
                say(f"checkpoint {path} is damaged ({damage})")
                continue
            reason = against(found)
            if reason is None:
                return found
            say(f"checkpoint {path} cannot be used ({reason})")
        return None

    def set_aside_after(self, found: Checkpoint | None, aside: Aside) -> None:
        """Move away what is newer than ``found``; None moves all. Unfinished files are deleted."""
        if not self.writes:
            return
        for stray in self.directory.glob(".task*.tmp"):
            delete(stray)
        for other in self.paths():
            if found is None or other.name > found.path.name:
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


def read_checkpoint(path: Path) -> State:
    """What :func:`write_checkpoint` wrote.

    Raises:
        DamagedError: the file is not as it was written.
        UsageError: it is, but cannot be read just now or by this version: memory, permissions, a
            disk that is not there, another format.
    """
    try:
        _verify(path)
        # Not to where it was written: every process would take its checkpoint to one device.
        state: State = torch.load(path, map_location="cpu", weights_only=True)
    except DamagedError:
        raise
    except Exception as error:  # the contents are those that were written: it is not the file's
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(f"cannot read the checkpoint {path} now ({said[0]})") from error
    if state.get("format") != FORMAT:
        raise UsageError(
            f"the checkpoint {path} has format {state.get('format')}, and this version of cl_bench "
            f"reads {FORMAT}: use the version that wrote it (environment.json says which)"
        )
    return state


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
