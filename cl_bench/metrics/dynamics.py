"""How an old task's score moves while a new one is learned, read off evaluations at some steps."""

import math
from collections.abc import Sequence


def steps_to_half(steps: Sequence[int], scores: Sequence[float]) -> float:
    """The first step evaluated at which at most half of the first score is left; NaN if none."""
    return next(
        (float(n) for n, score in zip(steps, scores, strict=True) if score <= scores[0] / 2),
        math.nan,
    )


def trough(scores: Sequence[float]) -> float:
    """The lowest score."""
    return min(scores)


def rebound(scores: Sequence[float]) -> float:
    """The last score minus the lowest."""
    return scores[-1] - min(scores)


def dynamics(
    steps: Sequence[int], scores: Sequence[float], rates: Sequence[float]
) -> dict[str, float]:
    """Everything above by name.

    Args:
        steps: at which was evaluated, rising, the first one before any step of the new task.
        scores: of the old task, in [0, 1].
        rates: sum of the learning rates of all steps up to then.

    Returns:
        ``steps_to_half``, ``rate_to_half`` (the sum of learning rates by then), ``trough``,
        ``rebound``. NaN where the old task had nothing to lose.
    """
    if not scores or scores[0] <= 0:
        names = ("steps_to_half", "rate_to_half", "trough", "rebound")
        return dict.fromkeys(names, math.nan)
    half = steps_to_half(steps, scores)
    at = math.nan if math.isnan(half) else rates[list(steps).index(int(half))]
    return {
        "steps_to_half": half,
        "rate_to_half": at,
        "trough": trough(scores),
        "rebound": rebound(scores),
    }


def matched(old: Sequence[float], new: Sequence[float], level: float) -> int | None:
    """The first evaluation that has the new task at ``level``: there strategies are compared.

    A strategy that learns less also forgets less, so old tasks are compared where the new one is
    learned equally well.

    Args:
        old: scores of the old tasks.
        new: scores of the new task at those evaluations.
        level: score of the new task, in [0, 1].

    Returns:
        The position, or None if the new task never gets there.

    Raises:
        ValueError: the two differ in length.
    """
    if len(old) != len(new):
        raise ValueError(f"{len(old)} old scores and {len(new)} new ones")
    return next((i for i, score in enumerate(new) if score >= level), None)
