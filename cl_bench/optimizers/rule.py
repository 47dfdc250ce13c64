"""What update rules of our own share: W <- (1 - lr * decay) W - lr * direction."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Rule(Optimizer):
    """Steps every parameter by itself, along a direction that a subclass gives.

    Its state is tensors and numbers, by parameter, so that a run can be resumed inside a task.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float, **options: Any) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **options})

    @abstractmethod
    def direction(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """What a step subtracts, times the rate.

        Args:
            gradient: of one parameter, a matrix (m, n) or a vector; not to be written to. Of a
                convolution the kernel's matrix (out, in * height * width).
            state: of that parameter, empty at first.
            group: the options of its group.
        """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad
                matrix = gradient.flatten(1) if gradient.dim() > 2 else gradient
                direction = self.direction(matrix, self.state[parameter], group)
                if group["weight_decay"]:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(direction.view_as(parameter), alpha=-group["lr"])
        return loss


def averaged(gradient: Tensor, state: dict[str, Any], decay: float) -> Tensor:
    """M <- decay M + (1 - decay) G: the state's ``momentum_buffer``, from zeros."""
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(gradient)
    buffer: Tensor = state["momentum_buffer"]
    return buffer.lerp_(gradient, 1 - decay)


def adam_step(
    gradient: Tensor, state: dict[str, Any], betas: tuple[float, float], eps: float
) -> Tensor:
    """Adam's direction for a gradient of any shape, both moments in the state (Kingma & Ba)."""
    if "step" not in state:
        state["step"] = 0
    for name in ("exp_avg", "exp_avg_sq"):
        if name not in state:
            state[name] = torch.zeros_like(gradient)
    state["step"] += 1
    first, second = betas
    state["exp_avg"].lerp_(gradient, 1 - first)
    state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
    corrected = state["exp_avg_sq"] / (1 - second ** state["step"])
    direction: Tensor = state["exp_avg"] / (corrected.sqrt() + eps)
    return direction.div(1 - first ** state["step"])
