"""Learning accuracy."""

from cl_bench.metrics.matrix import Matrix, diagonal, mean
from cl_bench.metrics.summaries.summary import Summary


def learning_accuracy(R: Matrix) -> float:
    """LA = 1/T sum_j R[j, j]: how well each task was learned when it was its turn.

    Riemer et al., "Learning to Learn without Forgetting by Maximizing Transfer and Minimizing
    Interference", ICLR 2019.
    """
    return mean(diagonal(R))


SUMMARY = Summary(
    "LA", "mean score of each task right after it was learned", learning_accuracy, place=5
)
