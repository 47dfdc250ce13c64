"""Runs whose tasks have different metrics: a mean over an F1 and a likelihood is no accuracy."""

import math
from collections.abc import Mapping, Sequence

from cl_bench.metrics.matrix import Matrix, tasks_learned
from cl_bench.metrics.summaries import summaries, summarise


def is_mixed(metrics: Sequence[str]) -> bool:
    """Whether tasks are scored in different ways.

    Args:
        metrics: of every task.
    """
    return len(set(metrics)) > 1


def summarise_alike(R: Matrix, metrics: Sequence[str]) -> dict[str, float]:
    """:func:`summarise`; all NaN where tasks have different metrics."""
    if is_mixed(metrics):
        return dict.fromkeys(summaries(), math.nan)
    return summarise(R)


def by_metric(R: Matrix, metrics: Sequence[str]) -> dict[str, Mapping[str, float]]:
    """Of every metric, means over the tasks so far that have it.

    Args:
        R: accuracy matrix (T + 1, T), of which the first t + 1 rows may be known.
        metrics: of every task.

    Returns:
        By metric: ``tasks``, how many; ``end`` = mean_j R[t, j]; ``learned`` = mean_j R[j, j],
        right after each was learned; ``change`` = mean_{j < t} (R[t, j] - R[j, j]), NaN without old
        ones.
    """
    done = tasks_learned(R)
    found: dict[str, Mapping[str, float]] = {}
    for metric in dict.fromkeys(metrics):
        own = [j for j in range(done) if metrics[j] == metric]
        old = [j for j in own if j < done - 1]
        if not own:
            continue
        found[metric] = {
            "tasks": len(own),
            "end": _mean([R[done, j] for j in own]),
            "learned": _mean([R[j + 1, j] for j in own]),
            "change": _mean([R[done, j] - R[j + 1, j] for j in old]),
        }
    return found


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values)) if values else math.nan
