"""Step numbers as they are given in a configuration."""

from collections.abc import Sequence


def steps_of(given: Sequence[int]) -> tuple[int, ...]:
    """Step numbers in order, each once."""
    return tuple(sorted(set(given)))
