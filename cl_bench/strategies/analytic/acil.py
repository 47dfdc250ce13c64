"""ACIL (Zhuang et al., NeurIPS 2022; github.com/ZHUANGHP/Analytic-continual-learning).

The network learns the first task with its own head, by ordinary training, and is frozen. From then
on W is the ridge regression on random features relu(R^T f), R uniform in (-1, 1) / sqrt(d). The
authors update (G + gamma I)^-1 recursively, batch by batch; sums of G give the same W. Classes that
come again join their sums, as in G-ACIL (Zhuang et al., 2024).
"""

import math

import torch
from torch import Tensor

from cl_bench.contracts.options import Index, Rate, Seed
from cl_bench.strategies.analytic.ridge_head import RidgeHead


class ACIL(RidgeHead):
    """Base training, random features, ridge regression of a given strength.

    Args:
        width: M; 0 reads the features themselves.
        gamma: lambda.
        seed: R is drawn with; None takes the run's.
        epochs: of base training; None takes the run's, 0 leaves the network as it is.
    """

    def __init__(
        self,
        width: Index = 2000,
        gamma: Rate = 0.1,
        seed: Seed | None = None,
        epochs: Index | None = None,
    ) -> None:
        super().__init__(width, [gamma], seed, epochs)

    def draw(self, d: int, rng: torch.Generator) -> Tensor:
        """Torch's default weights of a linear layer."""
        return (2 * torch.rand(d, self.width, generator=rng) - 1) / math.sqrt(d)
