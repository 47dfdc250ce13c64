"""Average accuracy."""

from cl_bench.metrics.matrix import Matrix
from cl_bench.metrics.summaries.summary import Summary


def average_accuracy(R: Matrix) -> float:
    """ACC = 1/T sum_j R[T, j]: the mean over all tasks at the end.

    Lopez-Paz & Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017, section 2.
    """
    return float(R[-1].mean())


SUMMARY = Summary("ACC", "mean over all tasks at the end", average_accuracy, place=1)
