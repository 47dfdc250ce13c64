"""Ctrl-C, SIGTERM and SIGHUP: end the run in order, whatever it is doing."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from cl_bench.ends import Stopped, ending_signals

CLOSING_SECONDS = 1.0
"""A key pressed again and again counts once: the record is being closed meanwhile."""


@dataclass
class _Deferral:
    active: bool = False
    pending: int | None = None


_deferral = _Deferral()


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, a signal waits until the end: half an import leaves modules that break others."""
    _deferral.active, _deferral.pending = True, None
    try:
        yield
    finally:
        _deferral.active = False
    if _deferral.pending is not None:
        raise Stopped(_deferral.pending)


@contextmanager
def stopping() -> Iterator[None]:
    """Inside, signals that ask for an end raise :class:`Stopped` in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    last = float("-inf")

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal last
        if _deferral.active:
            _deferral.pending = number
            return
        previous, last = last, time.monotonic()
        if last - previous > CLOSING_SECONDS:
            raise Stopped(number)

    before: dict[int, Any] = {number: signal.signal(number, stop) for number in ending_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
