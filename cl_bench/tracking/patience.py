"""A limit on the time that a logger may take from the run."""

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from cl_bench.metrics import Matrix
from cl_bench.tracking.sinks import Sink
from cl_bench.tracking.tables import Event

ANSWER_SECONDS = 60.0
"""How long a call may take."""

OPENING_SECONDS = 120.0
"""How long starting may take: W&B itself gives up after 90."""

CLOSING_SECONDS = 150.0
"""How long ending may take: W&B gives up on its upload after 120."""

SLOW_SECONDS = 1.0
"""A call that takes longer is slow."""

SLOW_TOTAL_SECONDS = 300.0
"""What all slow calls together may cost a run."""


class Patient:
    """Hands every call to a sink in a thread of its own, and waits for it as long as stated above.

    The run does wait for each call: what is sent, and when, does not depend on the thread. A
    sink that does not answer, or is slow for too long, raises ``TimeoutError``, and the record
    drops it as it drops a sink that fails.

    Args:
        sink: the logger.
    """

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.name = sink.name
        self._calls: queue.SimpleQueue[tuple[Future[None], Callable[[], None]] | None]
        self._calls = queue.SimpleQueue()
        self._worker: threading.Thread | None = None
        self._hangs = False
        self._slow = 0.0

    def start(self, task_names: Sequence[str]) -> None:
        """:meth:`Sink.start`, within the time for an opening."""
        self._call(lambda: self.sink.start(task_names), OPENING_SECONDS)

    def resume(self, events: Sequence[Event]) -> None:
        """:meth:`Sink.resume`, within the time for an opening."""
        self._call(lambda: self.sink.resume(events), OPENING_SECONDS)

    def event(self, event: Event) -> None:
        """:meth:`Sink.event`, within the time for a call."""
        self._call(lambda: self.sink.event(event))

    def finish(self, summary: Mapping[str, Any], task_names: Sequence[str], R: Matrix) -> None:
        """:meth:`Sink.finish`, within the time for a call."""
        self._call(lambda: self.sink.finish(summary, task_names, R))

    def figures(self, paths: Sequence[Path]) -> None:
        """:meth:`Sink.figures`, within the time for a call."""
        self._call(lambda: self.sink.figures(paths))

    def close(self, failed: bool) -> None:
        """:meth:`Sink.close`, within the time for a closing; not at all if the sink hangs."""
        try:
            self._call(lambda: self.sink.close(failed), CLOSING_SECONDS)
        finally:
            self._calls.put(None)

    def _call(self, call: Callable[[], None], patience: float | None = None) -> None:
        if self._hangs:
            raise TimeoutError("it hangs in an earlier call")
        if self._worker is None:
            # A daemon: the process may end while the sink still hangs.
            self._worker = threading.Thread(target=self._work, name=self.name, daemon=True)
            self._worker.start()
        answer: Future[None] = Future()
        limit = ANSWER_SECONDS if patience is None else patience
        begun = time.monotonic()
        self._calls.put((answer, call))
        try:
            answer.result(limit)
        except TimeoutError:
            if answer.done():  # the sink's own
                raise
            self._hangs = True
            raise TimeoutError(f"no answer for {limit:.0f} s") from None
        took = time.monotonic() - begun
        if patience is None and took > SLOW_SECONDS:
            self._slow += took
            if self._slow > SLOW_TOTAL_SECONDS:
                raise TimeoutError(f"slow calls have taken {self._slow:.0f} s")

    def _work(self) -> None:
        while (item := self._calls.get()) is not None:
            answer, call = item
            try:
                call()
            except BaseException as error:
                answer.set_exception(error)
            else:
                answer.set_result(None)
