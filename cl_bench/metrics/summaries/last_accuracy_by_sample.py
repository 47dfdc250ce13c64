"""Accuracy over all test samples at the end; tasks with more of them weigh more."""

from collections.abc import Sequence

import numpy as np

from cl_bench.metrics.matrix import Matrix
from cl_bench.metrics.summaries.summary import Further


def last_accuracy_by_sample(R: Matrix, samples: Sequence[int]) -> float:
    """A_T = sum_j n_j R[T, j] / sum_j n_j: accuracy over all test samples at the end.

    Rebuffi et al., "iCaRL", CVPR 2017.

    Args:
        R: accuracy matrix (T + 1, T).
        samples: n_j, test samples of each task.
    """
    return float(np.average(R[-1], weights=np.asarray(samples)))


FURTHER = Further(
    lambda e: None if e.samples is None else last_accuracy_by_sample(e.R, e.samples),
    "ACC by sample",
    "over all test samples at the end",
    place=11,
)
