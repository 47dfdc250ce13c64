"""Signals that ask a process to end, for the command line and for a run alike."""

import signal

COMPLETED = "the run is completed"
"""Note of an exception that ends a run with nothing left to do."""

HUNG_UP = "the terminal was closed, or what reads the output has ended"


class Stopped(KeyboardInterrupt):
    """Somebody asked the process to end.

    Args:
        number: the signal.
    """

    def __init__(self, number: int) -> None:
        name = signal.Signals(number).name
        self.number = number
        super().__init__(f"{name}: {HUNG_UP}" if self.hung_up else name)

    @property
    def hung_up(self) -> bool:
        """Whether the terminal was closed, or what reads the output has ended."""
        return signal.Signals(self.number).name == "SIGHUP"

    @property
    def exit_status(self) -> int:
        """What shells expect of a process that a signal ended.

        130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.
        """
        return 128 + self.number


def ending_signals() -> list[signal.Signals]:
    """Ctrl-C, SIGTERM, and a terminal that is closed, unless ``nohup`` says to go on without it."""
    found = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        found.append(signal.SIGHUP)
    return found
