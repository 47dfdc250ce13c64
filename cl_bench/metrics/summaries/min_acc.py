"""The worst that old tasks ever were."""

import numpy as np

from cl_bench.metrics.matrix import Matrix
from cl_bench.metrics.summaries.summary import Curves, Further


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


FURTHER = Further(
    lambda e: None if e.curves is None else min_accuracy(e.R, e.curves),
    "min-ACC",
    "lowest score of each old task since learned, evaluated inside tasks",
    place=14,
)
