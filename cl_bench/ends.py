"""Signals that ask a process to end, for the command line and for a run alike."""

import signal

COMPLETED = "the run is completed"
"""Note of an exception that ends a run with nothing left to do."""


def ending_signals() -> list[signal.Signals]:
    """Ctrl-C, SIGTERM, and a terminal that is closed, unless ``nohup`` says to go on without it."""
    found = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        found.append(signal.SIGHUP)
    return found
