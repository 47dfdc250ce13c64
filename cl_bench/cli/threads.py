"""How many threads a process computes with, and what they do while they wait for each other.

PyTorch takes a thread a core, and OpenMP's threads spin while they wait. Where another process
wants a core too, the thread that has to wait for it keeps all others spinning, and a small network,
which waits often, is slowed down many times.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cl_bench.errors import UsageError

AUTO = "auto"

MOST = 1024
"""Threads; of a great many more, torch dies without a word."""

NUMBERS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables by which a user, or a launcher, says how many threads there are."""

WAITS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables by which a user says how threads wait: anybody's OpenMP, GNU's, Intel's and LLVM's."""


def wait_passively() -> None:
    """Have threads sleep while they wait: OpenMP reads it as torch is loaded, and never again.

    Does nothing where that was decided: by the user's environment, or since torch is there.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in WAITS):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def check_threads(threads: object) -> None:
    """Raise :class:`UsageError` if ``trainer.threads`` is no number of threads."""
    whole = isinstance(threads, int) and not isinstance(threads, bool)
    if threads != AUTO and not (whole and 1 <= threads <= MOST):  # type: ignore[operator]
        shown = str(threads).lower() if isinstance(threads, bool) else threads
        raise UsageError(
            f"trainer.threads={shown}: use auto, or a whole number of at least 1 and at most {MOST}"
        )


def chosen(threads: object, processes: int = 1) -> int | None:
    """The number of threads for a run; None leaves it to torch, which the environment tells.

    Args:
        threads: ``trainer.threads``.
        processes: that share what this one may use.
    """
    check_threads(threads)
    if threads != AUTO:
        return int(threads)  # type: ignore[call-overload, no-any-return]
    if any(name in os.environ for name in NUMBERS):
        return None
    import torch

    # torch counts cores, not hyperthreads, but nothing of quotas.
    return max(1, min(torch.get_num_threads(), usable_cores()) // processes)


@contextmanager
def computing_with(threads: int | None) -> Iterator[None]:
    """Inside, torch computes with so many threads; None leaves it as it is."""
    import torch

    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: those of its affinity, and no more than its quota pays for.

    Args:
        root: where the system's files are.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, int(min([cores or 1, *_quotas(root)])))


def _quotas(root: Path) -> Iterator[float]:
    """Of the process's control group and those around it, in cores; versions 1 and 2."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mounts = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            places, read = (mounts, mounts / "unified"), _quota
        elif "cpu" in controllers.split(","):
            places, read = (mounts / controllers, mounts / "cpu"), _quota_of_version_1
        else:
            continue
        # A container may see its own group as the top, whatever it is called outside.
        inside = Path(path.lstrip("/"))
        for group in {Path(), inside, *inside.parents}:
            yield from (quota for place in places if (quota := read(place / group)) is not None)


def _quota(group: Path) -> float | None:
    try:
        quota, period = (group / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _quota_of_version_1(group: Path) -> float | None:
    try:
        quota = int((group / "cpu.cfs_quota_us").read_text())
        period = int((group / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return quota / period if quota > 0 and period > 0 else None
