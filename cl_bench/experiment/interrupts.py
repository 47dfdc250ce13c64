"""Ctrl-C, SIGTERM and SIGHUP while a run learns: wait for the next checkpoint, then end."""

import contextlib
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

from lightning import Trainer

from cl_bench.ends import ending_signals
from cl_bench.parallel.ranks import gathered

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
            self._before = {n: signal.getsignal(n) for n in ending_signals()}
            for number in self._before:
                signal.signal(number, self._hold)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

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
            with contextlib.suppress(OSError):  # the terminal may be gone
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


def without_signals(trainer: Trainer) -> Trainer:
    """The Trainer, which leaves the end of the process to us.

    Lightning takes SIGTERM for itself while it trains or tests, and then leaves the process with
    status 0 between two batches, without a checkpoint of ours.
    """
    connector = trainer._signal_connector
    theirs = connector.register_signal_handlers

    def register() -> None:
        before = {number: signal.getsignal(number) for number in ending_signals()}
        theirs()
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)

    connector.register_signal_handlers = register  # type: ignore[method-assign]
    return trainer
