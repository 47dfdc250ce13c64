"""Forgetting."""

import numpy as np

from cl_bench.metrics.matrix import Matrix, mean
from cl_bench.metrics.summaries.summary import Summary


def forgetting_per_task(R: Matrix) -> Matrix:
    """f_j = max_{j <= l < T} R[l, j] - R[T, j] for j < T: the best it was less what is left.

    Shape (T - 1,); negative where a task is better at the end than ever before. Rows that were not
    evaluated do not count in the maximum. Chaudhry et al., "Riemannian Walk for Incremental
    Learning", ECCV 2018, with the maximum over rows in which the task had been learned.
    """
    T = R.shape[1]
    best = [np.fmax.reduce(R[j + 1 : T, j]) for j in range(T - 1)]
    return np.array(best, dtype=np.float64) - R[-1, : T - 1]


def forgetting(R: Matrix) -> float:
    """F = 1/(T-1) sum_{j<T} f_j, see :func:`forgetting_per_task`; NaN for a single task."""
    return mean(forgetting_per_task(R))


SUMMARY = Summary(
    "forgetting",
    "best score since learned minus score at the end, old tasks",
    forgetting,
    better=-1,
    place=4,
)
