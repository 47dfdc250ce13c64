"""Average incremental accuracy."""

import numpy as np

from cl_bench.metrics.matrix import Matrix, mean
from cl_bench.metrics.summaries.summary import Summary


def average_incremental_accuracy(R: Matrix) -> float:
    """AIA = 1/T sum_i 1/i sum_{j<=i} R[i, j]: the mean over seen tasks, averaged over time.

    Rebuffi et al., "iCaRL", CVPR 2017 (there over classes), Douillard et al., "PODNet", ECCV 2020.
    """
    return mean(np.array([R[i, :i].mean() for i in range(1, len(R))]))


SUMMARY = Summary(
    "AIA",
    "mean over seen tasks, averaged over the sequence",
    average_incremental_accuracy,
    place=6,
)
