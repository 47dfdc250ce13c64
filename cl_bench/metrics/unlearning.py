"""What requests to forget leave: of what they name, and of everything else."""

import math
from collections.abc import Mapping, Sequence

Scores = Mapping[str, float]
"""By task, or by request."""


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores) if scores else math.nan


def utility_after(scores: Sequence[Scores]) -> list[float]:
    """Mean score of all tasks after 0, 1, 2, ... requests."""
    return [_mean(list(one.values())) for one in scores]


def forget_quality(forgotten: Sequence[Scores]) -> float:
    """Share of what was known of the requests' data that is gone at the end.

    The mean over requests of 1 - after / before, where before is before any request and after is
    after the last; 0 forgot nothing. A request of which nothing was known does not count.

    Args:
        forgotten: scores on what each request names, before the first and after each.
    """
    before, after = forgotten[0], forgotten[-1]
    return _mean([1 - after[name] / score for name, score in before.items() if score > 0])


def retained_utility(scores: Sequence[Scores]) -> float:
    """Mean score of all tasks at the end, over the one before any request."""
    utility = utility_after(scores)
    return utility[-1] / utility[0] if utility[0] > 0 else math.nan
