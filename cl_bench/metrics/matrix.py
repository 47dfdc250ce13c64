"""The accuracy matrix.

R has shape (T + 1, T) and holds scores in [0, 1]: R[i, j] is the score on the j-th task after i
tasks were learned. Row 0 is before any training. Formulas count tasks from 1 as the
papers do, so the diagonal R[j, j] is a task's score right after it was learned; in the array that
is ``R[j, j - 1]``. NaN stands where nothing was evaluated, or where the head of the task had never
been trained, and a summary that needs such a cell is NaN itself.
"""

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

TASK_AWARE = "task_aware_accuracy"
"""The measure beside a class-incremental score: its samples, with their task id known."""

ANSWERED = "answered_as/"
"""Measure, a task's index behind it: share of a task's samples whose answer is a class of that
task."""


def empty_matrix(tasks: int) -> Matrix:
    """R of a run that has not been evaluated yet: (T + 1, T), all NaN."""
    return np.full((tasks + 1, tasks), np.nan)


def diagonal(R: Matrix) -> Matrix:
    """R[j, j] for j = 1 ... T: each task right after it was learned, shape (T,)."""
    return np.diagonal(R, offset=-1).copy()


def intransigence(R: Matrix, joint: Matrix) -> float:
    """I = 1/T sum_k J[k, k] - R[k, k]: what a method could not learn that joint training could.

    Args:
        R: accuracy matrix of the method.
        joint: J, that of a model trained on tasks 1 ... k together for every k (strategy
            ``joint``); R's tasks, in R's order.

    Raises:
        ValueError: the matrices differ in shape.

    Chaudhry et al., "Riemannian Walk for Incremental Learning", ECCV 2018 (there for one k; here
    the mean over k). Negative means the method
    learned new tasks better than joint training.
    """
    if R.shape != joint.shape:
        raise ValueError(f"accuracy matrices of different streams: {R.shape} and {joint.shape}")
    return mean(diagonal(joint) - diagonal(R))


def tasks_learned(R: Matrix) -> int:
    """The last i for which every task learned so far has a score in row i; 0 if there is none."""
    complete = [i for i in range(1, len(R)) if np.isfinite(R[i, :i]).all()]
    return max(complete, default=0)


def so_far(R: Matrix) -> Matrix:
    """The matrix of the stream's first :func:`tasks_learned` tasks, shape (i + 1, i)."""
    done = tasks_learned(R)
    return R[: done + 1, :done]


def mean(values: Matrix) -> float:
    """The mean; of nothing NaN, without numpy's warning."""
    return float(values.mean()) if values.size else float("nan")
