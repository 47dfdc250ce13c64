"""OTA: models weighed, entry by entry, by the optimizer's squared gradients."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cl_bench.merging.rule import Deltas, Fold, Part, Rule, added, require

EPSILON = 1e-26
"""Joins every weight, so that entries that no optimizer moved get the plain mean."""


def factored(moments: Tensor) -> Tensor:
    """The rank-1 form of a matrix of moments: row sums times column sums over the total."""
    rows, columns = moments.sum(1, keepdim=True), moments.sum(0, keepdim=True)
    total = moments.sum()
    return rows * columns / total if total > 0 else torch.zeros_like(moments)


@dataclass(frozen=True)
class Ota(Rule):
    """sum (v^p tau) / sum v^p, with v a model's squared gradients as Adam keeps them.

    Folds exactly; two tensors a weight. The published method also masks entries, with thresholds
    found by a search over densities; that search could not be checked, and the mask is left out.
    Equal v give the plain mean. With one model it gives that model.

    Attributes:
        power: p.
        moments: ``raw``, where a model with larger gradients counts more, or ``normalised``, each
            model's divided by their mean over the whole model.
        factor_moments: replace a matrix's by their rank-1 form.
    """

    folds = True
    needs_moments = True
    power: float = 0.5
    moments: Literal["raw", "normalised"] = "normalised"
    factor_moments: bool = False

    def __post_init__(self) -> None:
        require("power", self.power, "[0, inf)", self.power >= 0)

    @property
    def measures(self) -> bool:  # type: ignore[override]
        """Where moments are divided by their mean."""
        return self.moments == "normalised"

    def measure(self, deltas: Deltas) -> float:
        """The mean of the moments over the whole model."""
        total = count = 0.0
        for part, _ in deltas():
            if part.moments is not None:
                total += float(part.moments.double().sum())
                count += part.moments.numel()
        return total / count if count else 0.0

    def fold(self, fold: Fold, delta: Tensor, part: Part) -> Fold:
        """Both sums; a weight without moments counts as one that was never stepped."""
        v = torch.zeros_like(delta) if part.moments is None else part.moments.to(delta)
        if self.measures and part.measure > 0:
            v = v / part.measure
        if self.factor_moments and part.matrix:
            v = factored(v)
        weight = v**self.power + EPSILON
        return {
            "weighted": added(fold, weight * delta, "weighted"),
            "weights": added(fold, weight, "weights"),
        }

    def merged(self, fold: Fold, part: Part) -> Tensor:
        """Their quotient."""
        return fold["weighted"] / fold["weights"]
