"""What single clients lose, seen through the mix of classes that they hold.

Clients have no test data of their own. A client's score on a task is the score of each class on the
global test data, weighted by the classes' shares in the client's own training data: the expected
score on test data of that mix.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def client_scores(counts: Tensor, by_class: Tensor) -> Tensor:
    """Expected score of every client (K,), NaN for those without data.

    Args:
        counts: training samples (K, C) by client and class.
        by_class: score of every class (C,); NaN where the test data has none of it.
    """
    known = counts.double() * by_class.isfinite()
    return (known * by_class.nan_to_num()).sum(1) / known.sum(1)


def client_forgetting(
    learned: Mapping[int, Tensor], now: Mapping[int, Tensor], last: int
) -> Tensor:
    """Mean over a client's old tasks of (score right after learning - score now), (K,).

    Args:
        learned: scores (K,) right after each task was learned, by task; NaN where not held.
        now: scores at present.
        last: index of the newest task, which does not count.
    """
    lost = [learned[t] - now[t] for t in sorted(learned) if t < last and t in now]
    if not lost:
        some = next(iter(now.values()))
        return torch.full_like(some, torch.nan)
    return torch.stack(lost).nanmean(0)


def spread(values: Tensor) -> dict[str, float]:
    """Mean, lowest and highest of the values that are there."""
    there = values[values.isfinite()]
    if not len(there):
        return {"mean": float("nan"), "lowest": float("nan"), "highest": float("nan")}
    return {
        "mean": float(there.mean()),
        "lowest": float(there.min()),
        "highest": float(there.max()),
    }
