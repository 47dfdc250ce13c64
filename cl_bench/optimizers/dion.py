"""Dion (Ahn et al., 2025): orthonormalised updates of low rank, with error feedback.

M <- M + G,   P = orth(M Q),   R = M^T P,   M <- M - (1 - mu) P R^T,
Q <- R with columns of length 1,   W <- W - lr sqrt(m / n) P Q^T
"""

import math
from typing import Any

import torch
from torch import Tensor

from cl_bench.optimizers.rule import Rule


class Dion(Rule):
    """For matrices alone. Q starts at random numbers, drawn from torch's generator.

    Args:
        params: parameters or groups.
        lr: of an update whose singular values are about 1.
        rank: of an update, at most the smaller side of the matrix.
        momentum: mu.
        weight_decay: decoupled.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        rank: int = 8,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        if rank < 1:
            raise ValueError(f"rank={rank}: must be at least 1")
        super().__init__(params, lr, weight_decay, rank=rank, momentum=momentum)

    def direction(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Sqrt(m / n) P Q^T."""
        m, n = gradient.shape
        if "Q" not in state:
            drawn = torch.randn(n, min(group["rank"], m, n), dtype=torch.float64)
            state["Q"], state["momentum_buffer"] = drawn.to(gradient), torch.zeros_like(gradient)
        M = state["momentum_buffer"].add_(gradient)
        P = torch.linalg.qr(M @ state["Q"]).Q
        R = M.t() @ P
        M.addmm_(P, R.t(), alpha=group["momentum"] - 1)
        state["Q"] = R / R.norm(dim=0, keepdim=True).clamp_min(torch.finfo(R.dtype).tiny)
        update: Tensor = P @ state["Q"].t()
        return update.mul(math.sqrt(m / n))
