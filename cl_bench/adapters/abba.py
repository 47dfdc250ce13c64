"""ABBA: the elementwise product of two low-rank matrices (Singhal et al., 2025).

W + alpha (B_1 A_1) * (B_2 A_2): a LoHa, which PEFT has, but for the start. B_1 A_1 begins as the
best rank-r approximation of W, B_1 = U_r S_r^1/2 and A_1 = S_r^1/2 V_r^T, so that the change is
scaled by the weight it is added to; B_2 begins at zero and A_2 with Kaiming's numbers. All four
train. ``alpha`` is the factor itself, sqrt(alpha_1 alpha_2) of the released code. Limit: o x d
products in every step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cl_bench.adapters.reparametrised import Reparametrisation, Reparametrised, top
from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import Count, Rate
from cl_bench.subspace import LinearMap


@checked("adapter.config.")
@dataclass
class ABBA(Reparametrisation):
    """A product of two pairs.

    Args:
        r: rank of each; 2 r (o + d) numbers.
        alpha: factor of the product.
    """

    r: Count = 4
    alpha: Rate = 8.0

    def layer(self, base: LinearMap, seen: Tensor | None) -> Reparametrised:
        """W + alpha (B_1 A_1) * (B_2 A_2)."""
        return _Layer(base, self)


class _Layer(Reparametrised):
    def __init__(self, base: LinearMap, config: ABBA) -> None:
        super().__init__(base)
        W = base.whole()
        U, S, Vt = top(W, config.r)
        self.B1, self.A1 = nn.Parameter(U * S.sqrt()), nn.Parameter(S.sqrt()[:, None] * Vt)
        self.B2 = nn.Parameter(torch.zeros_like(U))
        drawn = nn.init.kaiming_uniform_(torch.empty(Vt.shape))
        self.A2 = nn.Parameter(drawn.to(W))
        self.alpha = config.alpha

    def change(self) -> Tensor:
        return self.alpha * (self.B1 @ self.A1) * (self.B2 @ self.A2)
