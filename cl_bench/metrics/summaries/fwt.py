"""Forward transfer."""

import numpy as np

from cl_bench.metrics.matrix import Matrix, mean
from cl_bench.metrics.summaries.summary import Summary


def forward_transfer(R: Matrix) -> float:
    """FWT = 1/(T-1) sum_{j>=2} R[j-1, j] - R[0, j]: how much a task gains before its own training.

    The reference is the untrained network, as in the paper's b_j. NaN for a single task, and where
    a task's head is untrained until its turn comes. Lopez-Paz & Ranzato, "Gradient
    Episodic Memory for Continual Learning", NeurIPS 2017, section 2.
    """
    return mean(np.diagonal(R, offset=0)[1:] - R[0, 1:])


SUMMARY = Summary(
    "FWT",
    "gain on a task before its own training, over the untrained network",
    forward_transfer,
    signed=True,
    place=3,
)
