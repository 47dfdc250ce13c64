"""The lock on a run's directory: one process writes it at a time.

The kernel holds the lock (``flock``), for processes of other PID namespaces and containers too, and
lets go of it when the process ends, however it ends. The file names the process, and its time of
change is the heartbeat that machines go by which share the file system but no kernel.
"""

import contextlib
import importlib
import os
import re
import socket
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from cl_bench.contracts import UsageError
from cl_bench.tracking.files import (
    CONFIG,
    LOCK,
    MATRIX,
    NO_LINKS,
    RESULTS,
    SUMMARY,
    explained,
    make_directory,
    write,
)

fcntl: Any = None if os.name == "nt" else importlib.import_module("fcntl")
"""On Windows the file alone is the lock."""

BEAT_SECONDS = 20.0
"""Time between two heartbeats."""

SILENT_SECONDS = 120.0
"""After so long without one, a process of another machine counts as gone."""

ORPHAN_SECONDS = 10.0
"""How long the children of a process that was killed may take to notice."""


class Lock:
    """A directory that this process, and no other, writes to. Made by :func:`take_lock`.

    Attributes:
        path: of the file.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._released = threading.Event()
        _HELD.add(self)
        threading.Thread(target=self._beat, name="run-lock", daemon=True).start()

    def require(self) -> None:
        """Raise :class:`UsageError` if the lock is no longer ours: somebody deleted or took it."""
        if not self.held:
            raise UsageError(
                f"{self.path} was deleted or replaced while this run was writing: another process "
                "may write there now, so this one stops, and what it recorded stays; "
                f"go on with: python -m cl_bench resume={self.path.parent}"
            )

    @property
    def held(self) -> bool:
        """Whether the file is still the one that was locked."""
        try:
            there = os.stat(self.path, follow_symlinks=False)
        except OSError:
            return False
        return self._descriptor >= 0 and os.path.samestat(os.fstat(self._descriptor), there)

    def release(self) -> None:
        """Delete the lock, if it is ours; a second time does nothing."""
        if self._descriptor < 0:
            return
        self._released.set()
        # One that cannot be deleted is taken over once this process is gone.
        with contextlib.suppress(OSError):
            if self.held:
                self.path.unlink()
        self.let_go()
        if fcntl is None:  # Windows deletes no file that is open
            self.path.unlink(missing_ok=True)

    def let_go(self) -> None:
        """Close the file; the kernel frees the lock with the last copy of it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError, TypeError):
                os.utime(self._descriptor)


_HELD: "weakref.WeakSet[Lock]" = weakref.WeakSet()


def _forget_in_child() -> None:
    for lock in _HELD:
        lock.let_go()


if hasattr(os, "register_at_fork"):
    # A worker that outlives its killed parent must not hold the parent's directory.
    os.register_at_fork(after_in_child=_forget_in_child)


def claim(path: Path) -> Lock:
    """Make the directory and its lock; of several processes that try, one comes back.

    Raises:
        UsageError: the name cannot be given on a command line, another process writes there, or
            there is a run already.
    """
    if any(c in str(path) for c in "=,"):
        raise UsageError(
            f"run_dir={path}: a name with '=' or ',' could not be given back on the command line; "
            "use another run_dir=..."
        )
    make_directory(path)
    lock = take_lock(path)
    if any((path / name).exists() for name in (RESULTS, CONFIG, MATRIX, SUMMARY)):
        lock.release()
        raise UsageError(
            f"run_dir={path} already holds a run: give another run_dir=..., delete {path}, or go "
            f"on with it: python -m cl_bench resume={path}"
        )
    return lock


def take_lock(path: Path) -> Lock:
    """Lock a directory; the lock of a process that is gone is taken over.

    Raises:
        UsageError: another process writes there, or the disk refuses.
    """
    file = path / LOCK
    with explained(file):
        descriptor = _open_locked(file)
        if descriptor is None:
            raise UsageError(
                f"run_dir={path} is being written by {_text(file) or 'another process'}: give "
                f"another run_dir=...; if that process is gone, delete {file}"
            )
        try:
            os.ftruncate(descriptor, 0)
            write(descriptor, f"{ourselves()}\n".encode())
        except BaseException:  # Ctrl-C too: the kernel would keep the lock as long as we live
            with contextlib.suppress(OSError):
                file.unlink()
            os.close(descriptor)
            raise
    return Lock(file, descriptor)


def _open_locked(file: Path) -> int | None:
    """The lock's file, open and ours; None while another process holds it."""
    while True:
        flags = os.O_RDWR | os.O_CREAT | NO_LINKS | getattr(os, "O_NONBLOCK", 0)
        was_there = os.path.lexists(file)
        descriptor = os.open(file, flags, 0o666)
        kernel = _flocked(descriptor, file)
        if kernel is not False and was_there and not _is_gone(file, kernel is True):
            kernel = False
        if kernel is False:
            os.close(descriptor)
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(file, follow_symlinks=False)):
                return descriptor
        os.close(descriptor)  # whoever held it was ending, and has deleted the name meanwhile


def _flocked(descriptor: int, file: Path) -> bool | None:
    """Whether the kernel gave us the lock; None where system or disk know no such locks."""
    if fcntl is None:
        return None
    deadline = time.monotonic() + ORPHAN_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            # Children of a process that was killed hold it until they notice.
            held = HOLDER.match(_text(file))
            orphaned = held and held[2] == socket.gethostname() and _process_died(held)
            if not orphaned or time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        except OSError:  # a network disk
            return None


def ourselves() -> str:
    """How a lock names the current process."""
    started = _start_time(os.getpid())
    named = f"process {os.getpid()} on {socket.gethostname()}"
    tick = f", started at tick {started}" if started else ""
    return named + tick + (f", boot {_boot()}" if _boot() else "")


def _boot() -> str:
    """Which start of which machine this is; containers on it share it. Linux only."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _start_time(process: int) -> str | None:
    """When a process began, in clock ticks since boot: process ids are used again. Linux only."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


HOLDER = re.compile(
    r"process (\d+) on (\S+?)(?:, started at tick (\d+))?(?:, boot ([0-9a-f-]+))?\Z"
)


def _is_gone(file: Path, locked: bool) -> bool:
    """Whether the process that a lock names is there no more.

    Args:
        file: the lock.
        locked: whether the kernel has given it to us, so that no process of this machine has it.
    """
    holder = _text(file)
    if not holder:  # its writer died before it wrote
        return locked
    held = HOLDER.match(holder)
    if held is None or fcntl is None:
        return False
    here = held[2] == socket.gethostname()
    if held[4] == _boot() != "":
        return locked or (here and _process_died(held))
    if here and held[4] is None:
        return _process_died(held)
    return held[4] is not None and _silence(file) > SILENT_SECONDS


def _process_died(held: re.Match[str]) -> bool:
    process = int(held[1])
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    started = _start_time(process)
    return None not in (held[3], started) and held[3] != started


def _silence(lock: Path) -> float:
    """Seconds since the last heartbeat, by the clock of the file system."""
    probe = lock.with_name(f".{lock.name}.{os.getpid()}")
    try:
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            return os.fstat(descriptor).st_mtime - lock.stat().st_mtime
        finally:
            os.close(descriptor)
            probe.unlink()
    except OSError:
        return 0.0


def _text(lock: Path) -> str:
    """Who wrote the lock; it may have vanished, or not have been filled in yet."""
    try:
        return lock.read_text(errors="replace").strip()[:300]
    except OSError:
        return ""
