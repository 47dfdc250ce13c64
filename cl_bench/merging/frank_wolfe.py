"""FW-Merging (hard): Frank-Wolfe steps towards the model that the gradient points to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cl_bench.merging.models import Weights
from cl_bench.merging.rule import require

Gradient = Callable[[Weights], Weights]
"""The gradient of the tasks' mean loss at some weights."""


@dataclass(frozen=True)
class FrankWolfe:
    """Steps from a start towards one model at a time: the one that the loss falls towards.

    It needs all models and data of all tasks, so it does not fold.

    Attributes:
        iterations: how many steps.
        step: gamma_i = step * 2 / (i + 2), i from 0.
        scale: a step goes gamma_i * scale of the way.
        oracle: a model is chosen by the least inner product of the gradient with its weights, as in
            the paper, or by the least sum of cosines over weights, as in its code.
        granularity: one choice for the whole model, or one for every weight by itself.
    """

    iterations: int = 10
    step: float = 0.1
    scale: float = 0.3
    oracle: Literal["inner", "cosine"] = "inner"
    granularity: Literal["model", "weight"] = "model"

    def __post_init__(self) -> None:
        require("iterations", self.iterations, "[1, inf)", self.iterations >= 1)
        for name in ("step", "scale"):
            value = getattr(self, name)
            require(name, value, "(0, 1]", 0 < value <= 1)

    def merge(
        self, start: Weights, models: Sequence[Weights], gradient: Gradient
    ) -> dict[str, Tensor]:
        """The weights after all steps; they lie in the convex hull of start and models.

        Args:
            start: where it begins, usually a merge by another rule.
            models: with the same names.
            gradient: asked once a step.
        """
        theta = {name: weight.clone() for name, weight in start.items()}
        for i in range(self.iterations):
            chosen = self._choose(gradient(theta), models)
            share = self.scale * self.step * 2 / (i + 2)
            for name, model in chosen.items():
                theta[name] = torch.lerp(theta[name], model[name], share)
        return theta

    def _choose(self, g: Weights, models: Sequence[Weights]) -> dict[str, Weights]:
        names = list(models[0])
        scores = torch.tensor([[self._score(g[n], m[n]) for n in names] for m in models])
        if self.granularity == "model":
            best = models[int(scores.sum(1).argmin())]
            return dict.fromkeys(names, best)
        return {n: models[int(k)] for n, k in zip(names, scores.argmin(0), strict=True)}

    def _score(self, g: Tensor, weight: Tensor) -> float:
        product = (g.double() * weight.double()).sum()
        if self.oracle == "inner":
            return float(product)
        length = float(g.double().norm() * weight.double().norm())
        return float(product) / length if length > 0 else 0.0
