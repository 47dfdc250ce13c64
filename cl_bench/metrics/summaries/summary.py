"""What a summary of the accuracy matrix is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from cl_bench.metrics.matrix import Matrix


@dataclass(frozen=True)
class Summary:
    """One number of an accuracy matrix, and how reports show it.

    Attributes:
        label: in tables.
        meaning: half a line, for a reader who does not know it.
        of: the number, in [-1, 1], from the matrix of a stream learned to its end.
        better: whether more (1) or less (-1) is better.
        signed: whether a positive number is shown with its sign.
        place: where it stands among the others; those without one come last, by name.
    """

    label: str
    meaning: str
    of: Callable[[Matrix], float]
    better: Literal[1, -1] = 1
    signed: bool = False
    place: int = 100
