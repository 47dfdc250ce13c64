"""Measures of the class-incremental community, and of evaluation at every step.

R is the accuracy matrix of :mod:`cl_bench.metrics.matrix`; tasks count from 1 in formulas. "By
task" every task weighs the same, "by sample" every test sample does: tables of RanPAC weigh task
groups alike, PILOT's and iCaRL's are over all samples of the classes seen. The two differ where
tasks have test sets of different sizes, as in B50.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cl_bench.metrics.matrix import Matrix
from cl_bench.metrics.summaries.acc import average_accuracy
from cl_bench.metrics.summaries.average_incremental_accuracy import average_incremental_accuracy

ANSWERED = "answered_as/"
"""Measure, a task's index behind it: share of a task's samples whose answer is a class of that
task."""


def last_accuracy_by_sample(R: Matrix, samples: Sequence[int]) -> float:
    """A_T = sum_j n_j R[T, j] / sum_j n_j: accuracy over all test samples at the end.

    Rebuffi et al., "iCaRL", CVPR 2017.

    Args:
        R: accuracy matrix (T + 1, T).
        samples: n_j, test samples of each task.
    """
    return float(np.average(R[-1], weights=np.asarray(samples)))


def average_accuracy_by_sample(R: Matrix, samples: Sequence[int]) -> float:
    """1/T sum_i A_i, with A_i over all test samples of the i tasks learned; iCaRL's average.

    Args:
        R: accuracy matrix (T + 1, T).
        samples: test samples of each task.
    """
    n = np.asarray(samples)
    return float(np.mean([np.average(R[i, :i], weights=n[:i]) for i in range(1, len(R))]))


def by_task_and_by_sample(R: Matrix, samples: Sequence[int]) -> dict[str, float]:
    """Last and average accuracy, each with its name in full.

    Args:
        R: accuracy matrix (T + 1, T).
        samples: test samples of each task.
    """
    return {
        "last_accuracy_by_task": average_accuracy(R),
        "last_accuracy_by_sample": last_accuracy_by_sample(R, samples),
        "average_accuracy_by_task": average_incremental_accuracy(R),
        "average_accuracy_by_sample": average_accuracy_by_sample(R, samples),
    }


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


Curves = Sequence[Sequence[tuple[int, NDArray[np.float64]]]]
"""For every task, evaluations while it was learned: steps, rising from 0, and the score on each of
the tasks up to it. None for a task that was not evaluated so, as the first."""


def min_accuracy(R: Matrix, curves: Curves) -> float:
    """min-ACC = 1/(T-1) sum_{i<T} min_n A(i, n): the worst score of each old task, averaged.

    n goes over all evaluations after task i was learned, while later ones are learned and at their
    ends. De Lange, van de Ven & Tuytelaars, "Continual evaluation for lifelong learning:
    identifying the stability gap", ICLR 2023. NaN for a single task.

    Args:
        R: accuracy matrix (T + 1, T).
        curves: scores inside tasks.
    """
    T = R.shape[1]
    worst = []
    for i in range(T - 1):
        later = [float(v) for v in R[i + 2 :, i]]
        for t in range(i + 1, T):
            # Step 0 of the next task is the end of its own.
            later += [float(v[i]) for step, v in curves[t] if step > 0 or t > i + 1]
        worst.append(float(np.min(later)))
    return float(np.mean(worst)) if worst else float("nan")


def worst_case_accuracy(R: Matrix, curves: Curves) -> float:
    """WC-ACC = 1/T R[T, T] + (1 - 1/T) min-ACC: De Lange et al., ICLR 2023.

    Args:
        R: accuracy matrix (T + 1, T).
        curves: scores inside tasks.
    """
    T = R.shape[1]
    return float(R[-1, -1] / T + (1 - 1 / T) * min_accuracy(R, curves))


def stability_gap(curves: Curves) -> float:
    """How deep old scores dip while a task is learned, below what they have both before and after.

    The mean of min(first, last) - lowest over all tasks and all tasks before each: the part of a
    drop that comes back. De Lange et al. (ICLR 2023) name the gap, substantial but temporary
    forgetting, and measure it by min-ACC; the depth is ours. NaN where there are no curves.

    Args:
        curves: scores inside tasks.
    """
    dips = []
    for t, curve in enumerate(curves):
        for i in range(t if curve else 0):
            scores = [float(values[i]) for _, values in curve]
            dips.append(min(scores[0], scores[-1]) - float(np.min(scores)))
    return float(np.mean(dips)) if dips else float("nan")


def dense_summary(R: Matrix, curves: Curves) -> dict[str, float]:
    """What needs evaluation at steps, by name; nothing where a task after the first has none.

    Args:
        R: accuracy matrix (T + 1, T).
        curves: scores inside tasks.
    """
    if len(curves) < 2 or not all(curves[1:]):
        return {}
    return {
        "min_acc": min_accuracy(R, curves),
        "wc_acc": worst_case_accuracy(R, curves),
        "stability_gap": stability_gap(curves),
    }
