"""RanPAC (McDonnell et al., NeurIPS 2023; github.com/RanPAC/RanPAC @ 012927f).

Ridge regression on M random features relu(R^T f), R ~ N(0, 1), of a network that is frozen, or
frozen after the first task. Logits are W^T h, of h as it is.

The authors choose lambda for every task by that task's samples alone, a fifth of them held out at
random; here all samples so far decide, so that neither order nor division matters.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from cl_bench.contracts.options import Index, Length, Rate, Seed
from cl_bench.strategies.analytic.cosine_start import CosineStart
from cl_bench.strategies.analytic.ridge_head import RidgeHead

DECADES = tuple(float(f"1e{k}") for k in range(-8, 9))
"""The authors' values of lambda."""


class RanPAC(CosineStart, RidgeHead):
    """Random projection, second moments, ridge regression.

    Args:
        width: M; 0 reads the features themselves.
        strengths: for lambda, of which the samples choose; one alone is taken as it is.
        seed: R is drawn with; None takes the run's.
        epochs: of the first task, in which the whole network learns; None takes the run's.
    """

    def __init__(
        self,
        width: Index = 2000,
        strengths: Annotated[Sequence[Rate], Length(1)] = DECADES,
        seed: Seed | None = None,
        epochs: Index | None = 0,
    ) -> None:
        super().__init__(width, strengths, seed, epochs)

    def draw(self, d: int, rng: torch.Generator) -> Tensor:
        """Standard normal."""
        return torch.randn(d, self.width, generator=rng)
