"""Spectral Adapter: the top of the spectrum trains (Zhang and Pilanci, NeurIPS 2024).

With W = U S V^T and U_1, S_1, V_1 its r largest parts, ``additive`` learns A_U (o, r) and A_V (d,
r),

    W + (U_1 + A_U) S_1 (V_1 + A_V)^T - U_1 S_1 V_1^T,

and ``rotational`` turns both bases within themselves, U_1 R_U and V_1 R_V, each R = (I - Q)(I +
Q)^-1 of a skew Q, r (r - 1) / 2 numbers, from zero. It trains exactly what adaptive SVD protects,
and so is a natural negative control for it. Limit: a decomposition a layer at the start.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cl_bench.adapters.reparametrised import Reparametrisation, Reparametrised, kept, top
from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import Count
from cl_bench.subspace import LinearMap


@checked("adapter.config.")
@dataclass
class Spectral(Reparametrisation):
    """The top of the spectrum.

    Args:
        r: how many directions.
        kind: what is done to them.
    """

    r: Count = 8
    kind: Literal["additive", "rotational"] = "additive"

    def layer(self, base: LinearMap, seen: Tensor | None) -> Reparametrised:
        """W with its largest part changed."""
        if self.kind == "rotational" and self.r < 2:
            raise ValueError(f"r={self.r}: nothing turns within fewer than 2 directions")
        return _Layer(base, self)


class _Layer(Reparametrised):
    def __init__(self, base: LinearMap, config: Spectral) -> None:
        super().__init__(base)
        W = base.whole()
        U, S, Vt = top(W, config.r)
        kept(self, U=U, S=S, Vt=Vt)
        self.additive = config.kind == "additive"
        pairs = config.r * (config.r - 1) // 2
        sizes = (U.shape, Vt.t().shape) if self.additive else ((pairs,), (pairs,))
        self.left, self.right = (nn.Parameter(W.new_zeros(size)) for size in sizes)
        self.U: Tensor
        self.S: Tensor
        self.Vt: Tensor

    def change(self) -> Tensor:
        if self.additive:
            left, right = self.U + self.left, self.Vt + self.right.t()
        else:
            r = len(self.S)
            left, right = self.U @ rotation(self.left, r), rotation(self.right, r).t() @ self.Vt
        return (left * self.S) @ right - (self.U * self.S) @ self.Vt


def rotation(entries: Tensor, r: int) -> Tensor:
    """The rotation (r, r) of a skew matrix with these entries above the diagonal."""
    places = tuple(torch.triu_indices(r, r, 1, device=entries.device))
    half = entries.new_zeros(r, r).index_put(places, entries)
    skew, eye = half - half.t(), torch.eye(r, dtype=entries.dtype, device=entries.device)
    turned: Tensor = torch.linalg.solve(eye + skew, eye - skew)
    return turned
