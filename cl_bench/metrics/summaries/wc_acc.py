"""The newest task at its end, and old tasks at their worst."""

from cl_bench.metrics.matrix import Matrix
from cl_bench.metrics.summaries.min_acc import min_accuracy
from cl_bench.metrics.summaries.summary import Curves, Further


def worst_case_accuracy(R: Matrix, curves: Curves) -> float:
    """WC-ACC = 1/T R[T, T] + (1 - 1/T) min-ACC: De Lange et al., ICLR 2023.

    Args:
        R: accuracy matrix (T + 1, T).
        curves: scores inside tasks.
    """
    T = R.shape[1]
    return float(R[-1, -1] / T + (1 - 1 / T) * min_accuracy(R, curves))


FURTHER = Further(
    lambda e: None if e.curves is None else worst_case_accuracy(e.R, e.curves),
    "WC-ACC",
    "newest task at the end and min-ACC of the others",
    place=15,
)
