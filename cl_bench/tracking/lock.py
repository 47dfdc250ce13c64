"""Who writes a run's directory: one process at a time."""

import contextlib
import os
import re
import socket
from pathlib import Path

from cl_bench.contracts import UsageError
from cl_bench.tracking.files import (
    CONFIG,
    LOCK,
    MATRIX,
    RESULTS,
    SUMMARY,
    explained,
    make_directory,
    write,
)


def claim(path: Path) -> None:
    """Make the directory and its lock; of several processes that try, one comes back."""
    if any(c in str(path) for c in "=,"):
        raise UsageError(
            f"run_dir={path}: a name with '=' or ',' could not be given back on the command line; "
            "use another run_dir=..."
        )
    make_directory(path)
    take_lock(path)
    if any((path / name).exists() for name in (RESULTS, CONFIG, MATRIX, SUMMARY)):
        (path / LOCK).unlink()
        raise UsageError(
            f"run_dir={path} already holds a run: give another run_dir=..., delete {path}, or go "
            f"on with it: python -m cl_bench resume={path}"
        )


def take_lock(path: Path) -> None:
    """Make the lock of a directory; that of a process which is gone is taken over."""
    lock = path / LOCK
    with explained(lock):
        try:
            descriptor = os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            if _take_over(lock):
                return
            raise UsageError(
                f"run_dir={path} is being written by {_holder(lock)}: give another run_dir=...; "
                f"if that process is gone, delete {lock}"
            ) from None
        try:
            write(descriptor, f"{ourselves()}\n".encode())
        except OSError:
            with contextlib.suppress(OSError):
                lock.unlink()
            raise
        finally:
            os.close(descriptor)


def _take_over(lock: Path) -> bool:
    """Whether the lock was that of a dead process, and now is ours; of several that try, one's."""
    if os.name == "nt":
        return False
    import fcntl

    try:
        descriptor = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if not _is_gone(os.read(descriptor, 1000).decode()):
            return False
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.ftruncate(descriptor, 0)
        write(descriptor, f"{ourselves()}\n".encode())
        # Whoever held it may have been ending, and have deleted the name meanwhile.
        return lock.exists() and os.path.samestat(os.fstat(descriptor), lock.stat())
    finally:
        os.close(descriptor)


def ourselves() -> str:
    """How a lock names the current process."""
    started = _start_time(os.getpid())
    return f"process {os.getpid()} on {socket.gethostname()}" + (
        f", started at tick {started}" if started else ""
    )


def _start_time(process: int) -> str | None:
    """When a process began, in clock ticks since boot: process ids are used again. Linux only."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _is_gone(holder: str) -> bool:
    """Whether the process that a lock names ran on this host, and is there no more."""
    held = re.fullmatch(r"process (\d+) on (\S+?)(?:, started at tick (\d+))?", holder.strip())
    if held is None or held[2] != socket.gethostname():
        return False
    process = int(held[1])
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    started = _start_time(process)
    return None not in (held[3], started) and held[3] != started


def _holder(lock: Path) -> str:
    """Who wrote the lock; it may have vanished, or not have been filled in yet."""
    try:
        return lock.read_text().strip() or "another process"
    except OSError:
        return "another process"
