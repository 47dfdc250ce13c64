"""Backward transfer."""

from typing import Literal

from cl_bench.metrics.matrix import Matrix, diagonal, mean
from cl_bench.metrics.summaries.summary import Summary


def backward_transfer(R: Matrix, over: Literal["earlier", "all"] = "earlier") -> float:
    """BWT = 1/(T-1) sum_{j<T} R[T, j] - R[j, j]: what later tasks did to earlier ones.

    Negative means forgetting. NaN for a single task. Lopez-Paz & Ranzato, "Gradient Episodic
    Memory for Continual Learning", NeurIPS 2017, section 2.

    Args:
        R: accuracy matrix.
        over: ``all`` divides by T instead, as SAPT's published script does; for comparisons with
            its numbers only.
    """
    changes = R[-1] - diagonal(R)
    return mean(changes[:-1]) if over == "earlier" else mean(changes)


SUMMARY = Summary(
    "BWT",
    "change of old tasks since each was learned; negative is forgetting",
    backward_transfer,
    signed=True,
    place=2,
)
