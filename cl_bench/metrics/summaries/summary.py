"""What a summary of the accuracy matrix is, and one of more than the matrix."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cl_bench.metrics.matrix import Matrix

Curves = Sequence[Sequence[tuple[int, NDArray[np.float64]]]]
"""For every task, evaluations while it was learned: steps, rising from 0, and the score on each of
the tasks up to it. None for a task that was not evaluated so, as the first."""


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


@dataclass(frozen=True)
class Evidence:
    """What a run tells of the tasks learned so far; all but the matrix is None where it does not.

    Attributes:
        R: accuracy matrix (T + 1, T).
        samples: test samples of each task; of class-incremental runs.
        confusion: (T, T), share of the samples of task i that are answered, at the end, with a
            class of task j; rows sum to 1.
        curves: scores inside tasks, of every task after the first.
        requests: scores of tasks, and of what requests to forget name, before the first request
            and after each.
    """

    R: Matrix
    samples: Sequence[int] | None = None
    confusion: Matrix | None = None
    curves: Curves | None = None
    requests: Sequence[tuple[Mapping[str, float], Mapping[str, float]]] | None = None


@dataclass(frozen=True)
class Further:
    """One number that needs more than the matrix, so that only some runs have it.

    Attributes:
        of: the number, in [-1, 1]; None where the evidence lacks what it needs.
        label: in tables; None leaves it to ``summary.json``.
        meaning: half a line, for a reader who does not know it.
        better: whether more (1) or less (-1) is better.
        place: as of :class:`Summary`.
    """

    of: Callable[[Evidence], float | None]
    label: str | None = None
    meaning: str = ""
    better: Literal[1, -1] = 1
    place: int = 100
