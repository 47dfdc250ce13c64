"""MoRA: one square matrix in a low-rank pair's place (Jiang et al., 2024), with rotations (Eq. 9).

A layer's inputs are cut into pieces of k, k = sqrt(r (o + d)) rounded to an even number, the last
one filled up from the first inputs. Piece j is rotated as rotary embeddings rotate position j, and
all go through one M (k, k), which starts at zero; the pieces that come out stand one after
another, repeated or cut to o. So many pieces share M, and its rank is not r's. Limit: what piece j
says reaches the j-th stretch of outputs, and its repetitions, alone.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cl_bench.adapters.reparametrised import Reparametrisation, Reparametrised, kept
from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import Count
from cl_bench.subspace import LinearMap


@checked("adapter.config.")
@dataclass
class MoRA(Reparametrisation):
    """A square matrix for rotated pieces.

    Args:
        r: as many numbers as a LoRA of this rank, r (o + d), or a few less.
    """

    r: Count = 8

    def layer(self, base: LinearMap, seen: Tensor | None) -> Reparametrised:
        """W + what M makes of pieces."""
        return _Layer(base, self)


class _Layer(Reparametrised):
    def __init__(self, base: LinearMap, config: MoRA) -> None:
        super().__init__(base)
        W = base.whole()
        o, d = W.shape
        k = int(math.sqrt((o + d) * config.r) + 0.5) // 2 * 2
        if k > min(o, d):
            raise ValueError(f"r={config.r}: a square of {k} is larger than a layer of {o} x {d}")
        self.M = nn.Parameter(W.new_zeros(k, k))
        kept(self, turned=_turned(k, -(-d // k)).to(W))
        self.turned: Tensor

    def change(self) -> Tensor:
        o, d = self._map.out_features, self._map.in_features
        blocks: Tensor = torch.block_diag(*(self.M @ self.turned))  # type: ignore[no-untyped-call]  # (k n, k n), n pieces
        head, over = blocks[:, :d], blocks[:, d:]
        filled = head + nn.functional.pad(over, (0, d - over.shape[1]))
        return filled.repeat(-(-o // len(filled)), 1)[:o]


def _turned(k: int, pieces: int) -> Tensor:
    """Rotations (pieces, k, k), of piece j by j / 10000^(2 i / k) in plane (i, i + k / 2)."""
    angles = torch.outer(torch.arange(pieces), 10000.0 ** (-torch.arange(0, k, 2) / k))
    cos, sin = torch.diag_embed(angles.cos()), torch.diag_embed(angles.sin())
    return torch.cat([torch.cat([cos, -sin], 2), torch.cat([sin, cos], 2)], 1)
