"""Average of the accuracies over all test samples of the tasks seen so far."""

from collections.abc import Sequence

import numpy as np

from cl_bench.metrics.matrix import Matrix
from cl_bench.metrics.summaries.summary import Further


def average_accuracy_by_sample(R: Matrix, samples: Sequence[int]) -> float:
    """1/T sum_i A_i, with A_i over all test samples of the i tasks learned; iCaRL's average.

    Args:
        R: accuracy matrix (T + 1, T).
        samples: test samples of each task.
    """
    n = np.asarray(samples)
    return float(np.mean([np.average(R[i, :i], weights=n[:i]) for i in range(1, len(R))]))


FURTHER = Further(
    lambda e: None if e.samples is None else average_accuracy_by_sample(e.R, e.samples),
    "AIA by sample",
    "over all test samples of seen tasks, averaged over the sequence",
    place=12,
)
