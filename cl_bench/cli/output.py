"""Output whose reader may go away: a closed pipe, a lost terminal, a full disk under a log."""

import _thread
import contextlib
import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

GONE = (errno.EPIPE, errno.EIO)
"""Nobody reads any more; another error means that what is written cannot be kept."""


class Outlet:
    """A text stream that takes everything, also once the one behind it takes nothing more.

    Where the reader of a pipe has gone, the process gets what a closed terminal sends, SIGHUP, so
    that a run ends in order. Anything else, such as a full disk under a log file, only costs what
    would have been printed: the record has the numbers.

    Args:
        stream: where text goes while it can.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lost = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or drop the text."""
        if not self._lost:
            try:
                return self._stream.write(text)
            except UnicodeEncodeError as error:  # a terminal that knows ASCII alone
                return self._stream.write(text.encode(error.encoding, "replace").decode())
            except OSError as error:
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        """Flush, or drop what was buffered."""
        if not self._lost:
            try:
                self._stream.flush()
            except OSError as error:
                self._lose(error)

    def _lose(self, error: OSError) -> None:
        self._lost = True
        with contextlib.suppress(OSError, ValueError):
            # What is still buffered must not raise when the interpreter ends.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        if error.errno == errno.EPIPE and hasattr(signal, "SIGHUP"):
            _thread.interrupt_main(signal.SIGHUP)
        elif error.errno not in GONE:
            with contextlib.suppress(OSError):
                os.write(
                    2,
                    b"cannot write to %s (%s): what was to be printed is dropped\n"
                    % (
                        str(getattr(self._stream, "name", "the output")).encode(),
                        str(error.strerror).encode(),
                    ),
                )


@contextmanager
def patient_output() -> Iterator[None]:
    """Inside, printing never raises because of who reads it."""
    before = sys.stdout, sys.stderr
    # A process that was started without them, as some services are, has None there.
    ours = [Outlet(stream or open(os.devnull, "w")) for stream in before]  # noqa: SIM115
    sys.stdout, sys.stderr = ours
    try:
        yield
    finally:
        for outlet in ours:
            outlet.flush()
        # Somebody may have put a stream of their own there meanwhile.
        if sys.stdout is ours[0]:
            sys.stdout = before[0]
        if sys.stderr is ours[1]:
            sys.stderr = before[1]
