"""LoLDU: the diagonal of a triangular decomposition trains (Shi et al., 2024).

W = P L D U with L unit lower and U unit upper triangular, P a permutation. Of the first r diagonal
entries z and a factor s,

    W + s P L_r diag(z) U_r - s_0 P L_r diag(z_0) U_r

trains z and s alone, r + 1 numbers a layer, from z_0 = D's own entries and s_0 = alpha / r. Limit:
P L_r and U_r are held beside W; a layer whose D has a zero among the first r has no such
decomposition.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cl_bench.adapters.reparametrised import Reparametrisation, Reparametrised, kept
from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import Count, Rate
from cl_bench.subspace import LinearMap


@checked("adapter.config.")
@dataclass
class LoLDU(Reparametrisation):
    """A diagonal and a factor.

    Args:
        r: how many diagonal entries.
        alpha: s begins at alpha / r.
    """

    r: Count = 32
    alpha: Rate = 32.0

    def layer(self, base: LinearMap, seen: Tensor | None) -> Reparametrised:
        """W with another diagonal."""
        return _Layer(base, self)


class _Layer(Reparametrised):
    def __init__(self, base: LinearMap, config: LoLDU) -> None:
        super().__init__(base)
        W, r = base.whole(), config.r
        if r > min(W.shape):
            raise ValueError(f"r={r}: a layer has {min(W.shape)} diagonal entries")
        P, L, U = torch.linalg.lu(W.float())
        z = U.diagonal()[:r]
        if not z.all():
            raise ValueError(f"r={r}: a diagonal entry of layer {base.name!r} is zero")
        kept(self, PL=(P @ L)[:, :r].to(W), U=(U[:r] / z[:, None]).to(W))
        self.z = nn.Parameter(z.to(W).clone())
        self.s = nn.Parameter(W.new_tensor(config.alpha / r))
        kept(self, first=self.s * self.z)
        self.PL: Tensor
        self.U: Tensor
        self.first: Tensor

    def change(self) -> Tensor:
        return (self.PL * (self.s * self.z - self.first)) @ self.U
