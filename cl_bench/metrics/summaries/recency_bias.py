"""How far old samples are taken for the newest task."""

from cl_bench.metrics.matrix import Matrix
from cl_bench.metrics.summaries.summary import Further


def recency_bias(confusion: Matrix) -> float:
    """1/(T-1) sum_{j<T} C[j, T]: the share of old tasks' samples that is taken for the newest task.

    0 where no old sample is; NaN for a single task. What Masana et al., "Class-incremental
    learning: survey and performance evaluation on image classification", TPAMI 2022, call
    task-recency bias and read off this matrix.

    Args:
        confusion: C (T, T), share of the samples of task i that are answered with a class of task
            j; its rows sum to 1.
    """
    return float(confusion[:-1, -1].mean()) if len(confusion) > 1 else float("nan")


FURTHER = Further(
    lambda e: None if e.confusion is None else recency_bias(e.confusion),
    "recency bias",
    "old tasks' samples taken for the newest task, at the end",
    better=-1,
    place=13,
)
