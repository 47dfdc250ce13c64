"""Processes that a launcher starts: none outlives it, and any of them may be killed."""

import contextlib
import os
import select
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cl_bench.cli.ledger import Ledger
from cl_bench.errors import UsageError
from cl_bench.parallel.processes import alive

LOOK_SECONDS = 0.1
"""How often a launcher looks which processes have begun a job."""

ENDING_SECONDS = 10.0
"""What the other workers of a pool that broke are given to be gone."""


def go_through(sweep: Path, launch: Callable[[], Any]) -> None:
    """Have a launcher go through a sweep, again and again while its pool of workers breaks.

    joblib ends all workers when one is killed. The job of that one has failed, and gets no other
    chance from this command; jobs that lost their worker to it are gone on with.

    Args:
        sweep: its directory.
        launch: goes through all jobs; what is finished or has failed is skipped.

    Raises:
        UsageError: workers are killed before they begin a job.
    """
    ledger = Ledger(sweep)
    while True:
        try:
            with FirstGone(ledger) as first:
                launch()
            return
        except BrokenProcessPool as error:
            deadline = time.monotonic() + ENDING_SECONDS
            begun = {k: e for k, e in ledger.latest().items() if e["event"] == "started"}
            while any(map(alive, begun.values())) and time.monotonic() < deadline:
                time.sleep(LOOK_SECONDS)
            # Another command may be at further jobs of the same sweep.
            lost = {k: e for k, e in begun.items() if not alive(e)}
            if not lost:
                raise UsageError(
                    "a worker process was killed before it began a job: if memory is short, use "
                    "fewer at a time (hydra.launcher.n_jobs=...), and give the command again"
                ) from error
            killed = next((k for k, e in lost.items() if e["process"] == first.process), None)
            job = killed or next(iter(lost))
            number = lost[job].get("number", 0)
            ledger.write("failed", job, number=number, error="its process was killed")
            print(
                f"error: job {number} ({job}) failed: its process was killed (by the system, where "
                "memory is short); the other jobs go on, and the same command again resumes it",
                file=sys.stderr,
                flush=True,
            )


class FirstGone:
    """Watches the processes that have begun jobs of a sweep, and keeps which was gone first.

    A context manager. Without Linux's process descriptors it knows of none.

    Attributes:
        process: its number, or None.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.process: int | None = None
        self._ledger = ledger
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="first-gone", daemon=True)

    def __enter__(self) -> Self:
        if hasattr(os, "pidfd_open"):
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        poll, watched = select.poll(), dict[int, int]()
        size = -1
        with contextlib.ExitStack() as stack:
            while not self._ended.is_set() and self.process is None:
                if size != (size := self._ledger.size()):
                    for process in self._ledger.processes() - {os.getpid(), *watched.values()}:
                        with contextlib.suppress(OSError):  # it is gone already
                            descriptor = os.pidfd_open(process)
                            stack.callback(os.close, descriptor)
                            poll.register(descriptor, select.POLLIN)
                            watched[descriptor] = process
                for descriptor, _ in poll.poll(1000 * LOOK_SECONDS):
                    poll.unregister(descriptor)
                    if self.process is None and watched[descriptor] in self._ledger.processes():
                        self.process = watched[descriptor]  # it went in the middle of a job
