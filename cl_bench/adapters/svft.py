"""SVFT: sparse changes in the basis of a weight's singular vectors (Lingam et al., NeurIPS 2024).

W = U S V^T becomes U (S + M) V^T, where only entries of M at fixed places train: the diagonal
(``bands: 0``, the paper's "plain", min(o, d) of them), the diagonal and ``bands`` others on either
side, or as many places drawn at random. M is square, of the thin decomposition's size, and starts
at zero; the released code starts it at random. Limit: U and V are held beside W, which is as much
again.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cl_bench.adapters.reparametrised import Reparametrisation, Reparametrised, kept, top
from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import Index
from cl_bench.subspace import LinearMap


@checked("adapter.config.")
@dataclass
class SVFT(Reparametrisation):
    """Which entries of M train.

    Args:
        bands: diagonals on either side of the main one; there are k (2 bands + 1) - bands (bands +
            1) entries of k x k.
        pattern: ``banded``, or as many drawn at random.
    """

    bands: Index = 0
    pattern: Literal["banded", "random"] = "banded"

    def layer(self, base: LinearMap, seen: Tensor | None) -> Reparametrised:
        """U (S + M) V^T."""
        return _Layer(base, self)


class _Layer(Reparametrised):
    def __init__(self, base: LinearMap, config: SVFT) -> None:
        super().__init__(base)
        W = base.whole()
        k = min(W.shape)
        if config.bands >= k:
            raise ValueError(f"bands={config.bands}: a layer has {k} singular values")
        U, _, Vt = top(W, k)
        near = torch.arange(k, device=W.device)
        places = ((near[:, None] - near).abs() <= config.bands).nonzero().t()
        if config.pattern == "random":
            drawn = torch.randperm(k * k)[: places.shape[1]].sort().values.to(W.device)
            places = torch.stack([drawn // k, drawn % k])
        kept(self, U=U, Vt=Vt)
        self.register_buffer("places", places)
        self.M = nn.Parameter(W.new_zeros(places.shape[1]))
        self.U: Tensor
        self.Vt: Tensor
        self.places: Tensor

    def change(self) -> Tensor:
        k = self.U.shape[1]
        M = self.M.new_zeros(k, k).index_put(tuple(self.places), self.M)
        return self.U @ M @ self.Vt
