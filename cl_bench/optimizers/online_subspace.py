"""Online Subspace Descent (Liang et al., NeurIPS 2024): Adam in a subspace that learns.

With P (n x r), first the leading right singular vectors of G (m x n), m >= n, a step is Adam's for
G P, times P^T; then P takes a step of its own down |G' - G' P P^T|^2, G' = G / |G|, at the rate
1 / gap. Nothing keeps P orthonormal. A wide matrix is treated as its transpose.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from cl_bench.optimizers.rule import Rule, adam_step

DECAY = 0.01
"""Of P, decoupled, where AdamW steps it, as torch has it and the authors leave it."""


class OnlineSubspace(Rule):
    """For matrices alone.

    Args:
        params: parameters or groups.
        lr: of Adam.
        rank: r, at most the smaller side of the matrix.
        gap: steps that it takes P to move by about its own length.
        subspace: what steps P.
        betas: of Adam.
        eps: of Adam.
        weight_decay: of W, decoupled.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        rank: int = 8,
        gap: int = 200,
        subspace: Literal["adamw", "sgd"] = "adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if rank < 1 or gap < 1:
            raise ValueError(f"rank={rank}, gap={gap}: both must be at least 1")
        options = {"rank": rank, "gap": gap, "subspace": subspace, "betas": tuple(betas)}
        super().__init__(params, lr, weight_decay, eps=eps, **options)

    def direction(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Adam's direction in the subspace of before P's step."""
        wide = gradient.shape[0] < gradient.shape[1]
        G = gradient.t() if wide else gradient
        if "P" not in state:
            V = torch.linalg.svd(G, full_matrices=False).Vh.t()
            state["P"] = V[:, : group["rank"]].contiguous()
            state["moments"] = {}
        P = state["P"].clone()
        inside = adam_step(G @ P, state, group["betas"], group["eps"])
        self.follow(G / G.norm().clamp_min(torch.finfo(G.dtype).tiny), state, group)
        step: Tensor = inside @ P.t()
        return step.t() if wide else step

    def follow(self, G: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One step of P; the gradient of |G - G P P^T|^2 is -2 (G^T E + E^T G) P, E the rest."""
        P = state["P"]
        E = G - (G @ P) @ P.t()
        downhill = -2 * (G.t() @ (E @ P) + E.t() @ (G @ P))
        rate = 1 / group["gap"]
        if group["subspace"] == "sgd":
            P.sub_(rate * downhill)
            return
        P.mul_(1 - rate * DECAY)
        P.sub_(rate * adam_step(downhill, state["moments"], (0.9, 0.999), 1e-8))
