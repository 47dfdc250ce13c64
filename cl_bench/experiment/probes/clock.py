"""Where training stands, for those who watch."""

from dataclasses import dataclass


@dataclass
class Clock:
    """How far the current task is.

    Attributes:
        step: optimizer steps taken in it.
        rate_sum: sum of their learning rates.
    """

    step: int = 0
    rate_sum: float = 0.0
