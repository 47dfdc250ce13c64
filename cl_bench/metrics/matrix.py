"""The accuracy matrix and its summaries.

R has shape (T + 1, T) and holds scores in [0, 1]: R[i, j] is the score on the j-th task after i
tasks were learned. Row 0 is before any training. The formulas below count tasks from 1 as the
papers do, so the diagonal R[j, j] is a task's score right after it was learned; in the array that
is ``R[j, j - 1]``. NaN stands where nothing was evaluated, or where the head of the task had never
been trained, and a summary that needs such a cell is NaN itself.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

TASK_AWARE = "task_aware_accuracy"
"""The measure beside a class-incremental score: its samples, with their task id known."""


def empty_matrix(tasks: int) -> Matrix:
    """R of a run that has not been evaluated yet: (T + 1, T), all NaN."""
    return np.full((tasks + 1, tasks), np.nan)


def diagonal(R: Matrix) -> Matrix:
    """R[j, j] for j = 1 ... T: each task right after it was learned, shape (T,)."""
    return np.diagonal(R, offset=-1).copy()


def average_accuracy(R: Matrix) -> float:
    """ACC = 1/T sum_j R[T, j]: the mean over all tasks at the end.

    Lopez-Paz & Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017, section 2.
    """
    return float(R[-1].mean())


def backward_transfer(R: Matrix, over: Literal["earlier", "all"] = "earlier") -> float:
    """BWT = 1/(T-1) sum_{j<T} R[T, j] - R[j, j]: what later tasks did to earlier ones.

    Negative means forgetting. NaN for a single task. Lopez-Paz & Ranzato 2017.

    Args:
        R: accuracy matrix.
        over: ``all`` divides by T instead, as SAPT's published script does; for comparisons with
            its numbers only.
    """
    changes = R[-1] - diagonal(R)
    return _mean(changes[:-1]) if over == "earlier" else _mean(changes)


def forward_transfer(R: Matrix) -> float:
    """FWT = 1/(T-1) sum_{j>=2} R[j-1, j] - R[0, j]: how much a task gains before its own training.

    The reference is the untrained network, as in the paper's b_j. NaN for a single task, and where
    a task's head is untrained until its turn comes. Lopez-Paz & Ranzato 2017.
    """
    return _mean(np.diagonal(R, offset=0)[1:] - R[0, 1:])


def forgetting_per_task(R: Matrix) -> Matrix:
    """f_j = max_{j <= l < T} R[l, j] - R[T, j] for j < T: the best it was less what is left.

    Shape (T - 1,); negative where a task is better at the end than ever before. Rows that were not
    evaluated do not count in the maximum. Chaudhry et al., "Riemannian Walk for Incremental
    Learning", ECCV 2018, with the maximum over rows in which the task had been learned.
    """
    T = R.shape[1]
    best = [np.fmax.reduce(R[j + 1 : T, j]) for j in range(T - 1)]
    return np.array(best, dtype=np.float64) - R[-1, : T - 1]


def forgetting(R: Matrix) -> float:
    """F = 1/(T-1) sum_{j<T} f_j, see :func:`forgetting_per_task`; NaN for a single task."""
    return _mean(forgetting_per_task(R))


def learning_accuracy(R: Matrix) -> float:
    """LA = 1/T sum_j R[j, j]: how well each task was learned when it was its turn.

    Riemer et al., "Learning to Learn without Forgetting by Maximizing Transfer and Minimizing
    Interference", ICLR 2019.
    """
    return _mean(diagonal(R))


def intransigence(R: Matrix, joint: Matrix) -> float:
    """I = 1/T sum_k J[k, k] - R[k, k]: what a method could not learn that joint training could.

    Args:
        R: accuracy matrix of the method.
        joint: J, that of a model trained on tasks 1 ... k together for every k (strategy
            ``joint``); R's tasks, in R's order.

    Raises:
        ValueError: the matrices differ in shape.

    Chaudhry et al. 2018 (there for one k; here the mean over k). Negative means the method
    learned new tasks better than joint training.
    """
    if R.shape != joint.shape:
        raise ValueError(f"accuracy matrices of different streams: {R.shape} and {joint.shape}")
    return _mean(diagonal(joint) - diagonal(R))


def average_incremental_accuracy(R: Matrix) -> float:
    """AIA = 1/T sum_i 1/i sum_{j<=i} R[i, j]: the mean over seen tasks, averaged over time.

    Rebuffi et al., "iCaRL", CVPR 2017 (there over classes), Douillard et al., "PODNet", ECCV 2020.
    """
    return _mean(np.array([R[i, :i].mean() for i in range(1, len(R))]))


def tasks_learned(R: Matrix) -> int:
    """The last i for which every task learned so far has a score in row i; 0 if there is none."""
    complete = [i for i in range(1, len(R)) if np.isfinite(R[i, :i]).all()]
    return max(complete, default=0)


def so_far(R: Matrix) -> Matrix:
    """The matrix of the stream's first :func:`tasks_learned` tasks, shape (i + 1, i)."""
    done = tasks_learned(R)
    return R[: done + 1, :done]


def summarise(R: Matrix) -> dict[str, float]:
    """Every summary by name, in [-1, 1]; of a partial run, those of the tasks learned so far."""
    done = so_far(R)
    if done.shape[1] == 0:
        return dict.fromkeys(SUMMARIES, float("nan"))
    return {name: summary(done) for name, summary in SUMMARIES.items()}


SUMMARIES = {
    "acc": average_accuracy,
    "bwt": backward_transfer,
    "fwt": forward_transfer,
    "forgetting": forgetting,
    "learning_accuracy": learning_accuracy,
    "average_incremental_accuracy": average_incremental_accuracy,
}
"""Summaries of one accuracy matrix, in the order in which reports show them."""


def _mean(values: Matrix) -> float:
    """The mean; of nothing NaN, without numpy's warning."""
    return float(values.mean()) if values.size else float("nan")
