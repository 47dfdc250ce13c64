"""How deep old scores dip inside a task, and come back."""

import numpy as np

from cl_bench.metrics.summaries.summary import Curves, Further


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


FURTHER = Further(
    lambda e: None if e.curves is None else stability_gap(e.curves),
    "stability gap",
    "how deep old scores dip inside a task, and come back",
    better=-1,
    place=16,
)
