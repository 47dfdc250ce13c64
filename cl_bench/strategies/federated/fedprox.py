"""FedProx (Li et al., MLSys 2020): clients stay near the weights that they were sent.

Client k minimises F_k(w) + mu / 2 ||w - w^r||^2, where w^r are the weights that round r began with.
"""

import torch
from torch import Tensor

from cl_bench.contracts import Batch, FederatedStrategy, Learner, Needs, Task
from cl_bench.contracts.options import Strength


class FedProx(FederatedStrategy):
    """A proximal term on every client.

    Args:
        mu: strength of the pull; 0 is FedAvg.
    """

    needs = Needs(engines=frozenset({"federated"}))

    def __init__(self, mu: Strength = 0.01) -> None:
        self.mu = mu
        self.start: dict[str, Tensor] = {}

    def setup(self, learner: Learner, task: Task) -> None:
        """A client begins at w^r."""
        self.start = {name: p.detach().clone() for name, p in learner.named_trainable().items()}

    def penalty(self, learner: Learner, batch: Batch, out: Tensor) -> Tensor | None:
        """The proximal term mu / 2 ||w - w^r||^2."""
        if self.mu == 0:
            return None
        weights = learner.named_trainable()
        terms = [(weights[name] - w).square().sum() for name, w in self.start.items()]
        return self.mu / 2 * torch.stack(terms).sum()

    def release(self, learner: Learner) -> None:
        """The round is over."""
        self.start = {}
