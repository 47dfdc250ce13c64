"""Lookahead (Zhang et al., NeurIPS 2019): every k steps back, part of the way, to slow weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from cl_bench.optimizers.wrapped import Wrapped


class Lookahead(Wrapped):
    """After every k steps of another optimizer, slow <- slow + alpha (W - slow), W <- slow.

    Slow weights begin as the weights before the first step.

    Args:
        params: parameters or groups.
        inner: builds the other optimizer.
        lr: of it.
        k: steps between two returns.
        alpha: of the way to the fast weights; 1 is the other optimizer.
    """

    def __init__(
        self,
        params: Any,
        inner: Callable[..., Optimizer],
        lr: float,
        k: int = 5,
        alpha: float = 0.5,
    ) -> None:
        if k < 1 or not 0 <= alpha <= 1:
            raise ValueError(f"k={k}, alpha={alpha}: at least one step, and a share in [0, 1]")
        super().__init__([inner(params, lr=lr)])
        self.k, self.alpha = k, alpha
        for group in self.param_groups:
            group.setdefault("fast_steps", 0)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """A fast step, and after k of them the return."""
        moving = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        # Beside the other optimizer's state, which must be empty at its first step.
        begun = {p: p.detach().clone() for p in moving if "slow" not in self.state.get(p, {})}
        loss = super().step(closure)
        for parameter, slow in begun.items():
            self.state[parameter]["slow"] = slow
        for group in self.param_groups:
            group["fast_steps"] += 1
            if group["fast_steps"] % self.k == 0:
                for parameter in group["params"]:
                    if "slow" in self.state.get(parameter, {}):
                        slow = self.state[parameter]["slow"]
                        parameter.copy_(slow.lerp_(parameter, self.alpha))
        return loss
