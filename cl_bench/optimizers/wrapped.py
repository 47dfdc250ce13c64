"""Optimizers that are made of others: one state, one list of groups, one format of a state dict."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer


class Wrapped(Optimizer):
    """Hands its steps on.

    Schedules, hooks, checkpoints and whoever reads second moments see a single optimizer, whose
    groups and state are those of the ones inside.

    Args:
        inner: optimizers of disjoint parameters.
    """

    def __init__(self, inner: Sequence[Optimizer]) -> None:
        self.inner = list(inner)
        super().__init__([group for o in self.inner for group in o.param_groups], {})
        self._share()

    def _share(self) -> None:
        self.param_groups = [group for o in self.inner for group in o.param_groups]
        for optimizer in self.inner:
            self.state.update(optimizer.state)
            optimizer.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of all."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.inner:
            optimizer.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Every optimizer inside loads its part, in its own way."""
        groups, first, index = state_dict["param_groups"], 0, 0
        for optimizer in self.inner:
            mine = groups[index : index + len(optimizer.param_groups)]
            size = sum(len(group["params"]) for group in mine)
            state = state_dict["state"].items()
            optimizer.load_state_dict(
                {
                    "state": {k - first: v for k, v in state if first <= k < first + size},
                    "param_groups": [
                        {**group, "params": [k - first for k in group["params"]]} for group in mine
                    ],
                }
            )
            first, index = first + size, index + len(mine)
        self.state.clear()
        self._share()
