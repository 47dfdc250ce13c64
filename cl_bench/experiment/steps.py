"""Step numbers as they are given in a configuration."""

from collections.abc import Sequence

from cl_bench.contracts import UsageError


def steps_of(key: str, given: Sequence[int]) -> tuple[int, ...]:
    """Step numbers in order, each once.

    Raises:
        UsageError: one of them is no whole number of at least 0.
    """
    steps = list(given)
    if any(not isinstance(n, int) or n < 0 for n in steps):
        raise UsageError(f"{key}={steps}: steps are whole numbers from 0, such as [0,10,20,40]")
    return tuple(sorted(set(steps)))
