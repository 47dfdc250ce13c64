"""Adam in a few columns of the cosine transform (Modoranu et al., 2025, arXiv:2505.17967).

With D the orthonormal DCT matrix of the smaller side, S = G D; the r columns in which S is longest
are kept, Adam's moments live in them, and the step goes back through the same columns of D. Where
the choice changes, columns that stay keep their moments (D_old^T D_new is zeros and ones). Without
the authors' quantised error feedback.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from cl_bench.optimizers.rule import Rule, adam_step


class DCTAdam(Rule):
    """For matrices alone; a wide one is treated as its transpose.

    Args:
        params: parameters or groups.
        lr: of Adam.
        rank: r, at most the smaller side of the matrix.
        gap: steps after which columns are chosen anew.
        betas: of Adam.
        eps: of Adam.
        weight_decay: decoupled.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        rank: int = 8,
        gap: int = 1,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if rank < 1 or gap < 1:
            raise ValueError(f"rank={rank}, gap={gap}: both must be at least 1")
        options = {"rank": rank, "gap": gap, "betas": tuple(betas), "eps": eps}
        super().__init__(params, lr, weight_decay, **options)

    def direction(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Adam's direction for the chosen columns of S, back in W's coordinates."""
        wide = gradient.shape[0] < gradient.shape[1]
        G = gradient.t() if wide else gradient
        D = cosines(G.shape[1]).to(G)
        S = G @ D
        if state.get("step", 0) % group["gap"] == 0:
            self.choose(S, state, group["rank"])
        columns = state["columns"].long()
        step: Tensor = adam_step(S[:, columns], state, group["betas"], group["eps"]) @ (
            D[:, columns].t()
        )
        return step.t() if wide else step

    def choose(self, S: Tensor, state: dict[str, Any], rank: int) -> None:
        """The longest columns; moments move with those that stay."""
        r = min(rank, S.shape[1])
        new = S.norm(dim=0).topk(r).indices.sort().values
        if "columns" in state:
            old = state["columns"].long()
            stays = (old[:, None] == new[None, :]).to(S)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name] @ stays
        # As numbers of the weights' kind: an optimizer's state is turned into that when loaded.
        state["columns"] = new.to(S)


@functools.lru_cache(maxsize=32)
def cosines(n: int) -> Tensor:
    """The orthonormal DCT-II matrix (n, n), float64; column k is cos(pi k (i + 1/2) / n)."""
    i = torch.arange(n, dtype=torch.float64)
    D = torch.cos(math.pi * (i[:, None] + 0.5) * i / n) * math.sqrt(2 / n)
    D[:, 0] /= math.sqrt(2)
    return D
