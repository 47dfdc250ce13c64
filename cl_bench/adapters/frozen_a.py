"""LoRA of which one factor trains (Zhu et al., "Asymmetry in low-rank adapters", ICML 2024).

W + alpha / r B A, with A (r, d) random, orthonormal rows and frozen, and B (o, r) from zero. What
is learned reads the r directions of A for ever. Limit: r may not exceed d.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cl_bench.adapters.reparametrised import Reparametrisation, Reparametrised
from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import Count, Rate
from cl_bench.subspace import LinearMap


@checked("adapter.config.")
@dataclass
class FrozenA(Reparametrisation):
    """LoRA with a frozen down-projection.

    Args:
        r: rank.
        alpha: alpha / r B A is added.
    """

    r: Count = 8
    alpha: Rate = 16.0

    def layer(self, base: LinearMap, seen: Tensor | None) -> Reparametrised:
        """W + alpha / r B A."""
        return _Layer(base, self)


class _Layer(Reparametrised):
    def __init__(self, base: LinearMap, config: FrozenA) -> None:
        super().__init__(base)
        W = base.whole()
        o, d = W.shape
        if config.r > d:
            raise ValueError(f"r={config.r}: a layer has {d} inputs")
        A = torch.linalg.qr(torch.randn(d, config.r))[0].t().contiguous()
        self.register_buffer("A", A.to(W))
        self.B = nn.Parameter(W.new_zeros(o, config.r))
        self.scale = config.alpha / config.r
        self.A: Tensor

    def change(self) -> Tensor:
        return self.scale * self.B @ self.A
