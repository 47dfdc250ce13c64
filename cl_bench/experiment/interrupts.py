"""Ctrl-C and SIGTERM while a run learns: wait for the next checkpoint, then end."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

from cl_bench.learners.ranks import gathered

PATIENCE_SECONDS = 1.0
"""A signal that comes again within this time is the same one: keys repeat, launchers too."""

NOTICE = b"\n%s: finishing the step and saving a checkpoint; once more stops at once\n"


class Interrupts:
    """Holds the first signal back until :meth:`stop`; a second one goes where it always went.

    A context manager. Outside the main thread, where Python takes no signals, it does nothing.

    Args:
        enabled: whether there are checkpoints to wait for.

    Attributes:
        requested: the signal that came, or None.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.requested: int | None = None
        self._at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if self.enabled and threading.current_thread() is threading.main_thread():
            self._before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
            self.install()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Take the signals (again): Lightning's Trainer puts a handler of its own before ours."""
        for number in self._before:
            signal.signal(number, self._hold)

    def agree(self) -> bool:
        """Whether a signal came, here or in another process of the run; they then all hold it.

        All of them get the same answer, even if one comes here a moment later.
        """
        heard = max(gathered(self.requested or 0))
        if heard and self.requested is None:  # its own copy of that signal may be on its way
            self.requested, self._at = heard, time.monotonic()
        return heard > 0

    def stop(self) -> None:
        """Pass on the signal that was held back, if one was: nothing is lost from here."""
        if self.requested is not None:
            self._pass_on(self.requested, None)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested, self._at = number, time.monotonic()
            # Nothing that buffers: the signal may have come in the middle of a print.
            os.write(2, NOTICE % signal.Signals(number).name.encode())
        elif time.monotonic() - self._at > PATIENCE_SECONDS:
            self._pass_on(number, frame)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        handler = self._before[number]
        if callable(handler):
            handler(number, frame)
        elif handler == signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
