"""SGD with momentum whose every update is multiplied by a number drawn from Exp(1).

Zhang & Cutkosky, 2024, "Random Scaling and Momentum for Non-smooth Non-convex Optimization": mean
and variance of the numbers are 1, so that the mean step is SGDM's.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cl_bench.optimizers.rule import Rule


class RandomScaling(Rule):
    """One number a step, for all parameters.

    Args:
        params: parameters or groups.
        lr: of the mean step.
        momentum: beta of M <- beta M + G.
        weight_decay: decoupled.
    """

    def __init__(
        self, params: Any, lr: float = 0.01, momentum: float = 0.9, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, lr, weight_decay, momentum=momentum, scale=1.0)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Draw the step's number from torch's generator, then step."""
        drawn = float(torch.empty((), dtype=torch.float64).exponential_())
        for group in self.param_groups:
            group["scale"] = drawn
        return super().step(closure)

    def direction(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """The number times M."""
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        M: Tensor = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        return M.mul(group["scale"])
