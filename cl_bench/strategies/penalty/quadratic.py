"""What penalties on weight changes have in common: one quadratic around the latest weights."""

from collections.abc import Mapping

import torch
from torch import Tensor

from cl_bench.contracts import Batch, FederatedStrategy, Learner, State
from cl_bench.contracts.options import Strength


class Quadratic(FederatedStrategy):
    """The penalty c sum_i Omega_i (theta_i - theta*_i)^2.

    Args:
        strength: c.

    Attributes:
        importance: Omega of every parameter that a task has trained, by name.
        centre: theta*, the weights after the last task that trained them, by name.
    """

    def __init__(self, strength: Strength) -> None:
        self.strength = strength
        self.importance: dict[str, Tensor] = {}
        self.centre: dict[str, Tensor] = {}

    def penalty(self, learner: Learner, batch: Batch, out: Tensor) -> Tensor | None:
        """The penalty, over what trains now and trained before."""
        weights = {n: p for n, p in learner.named_trainable().items() if n in self.importance}
        if not weights:
            return None
        terms = [
            (self.importance[n].to(p) * (p - self.centre[n].to(p)).square()).sum()
            for n, p in weights.items()
        ]
        return self.strength * torch.stack(terms).sum()

    def remember(self, learner: Learner, found: Mapping[str, Tensor]) -> None:
        """Omega <- Omega + what a task has found, theta* <- the weights as they are."""
        for name, p in learner.named_trainable().items():
            before = self.importance.get(name, torch.zeros_like(p)).to(p)
            self.importance[name] = before + found[name].to(p)
            self.centre[name] = p.detach().clone()

    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """Mean importance of every parameter tensor."""
        return {n: {"importance_mean": float(v.mean())} for n, v in self.importance.items()}

    def state_dict(self) -> State:
        """Importance and centre."""
        return {"importance": dict(self.importance), "centre": dict(self.centre)}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.importance, self.centre = dict(state["importance"]), dict(state["centre"])
