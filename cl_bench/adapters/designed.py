"""Low-rank pairs whose start is designed: what A reads, and where B begins.

W + scale (B - B_0) A, with A (r, d) and B (o, r). Zero at the start, wherever B begins.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from cl_bench.adapters.reparametrised import Reparametrisation, Reparametrised
from cl_bench.subspace import LinearMap


@dataclass(frozen=True)
class Pair:
    """How a pair begins.

    Attributes:
        A: (r, d).
        B: (o, r); None is zero.
    """

    A: Tensor
    B: Tensor | None = None


@dataclass
class Designed(Reparametrisation):
    """A pair for every layer.

    Args:
        pairs: how they begin, by layer.
        scale: scale (B - B_0) A is added.
        trains_a: whether A trains too.
    """

    pairs: Mapping[str, Pair]
    scale: float
    trains_a: bool = False

    def layer(self, base: LinearMap, seen: Tensor | None) -> Reparametrised:
        """W + scale (B - B_0) A."""
        return DesignedLayer(base, self.pairs[base.name], self.scale, self.trains_a)


class DesignedLayer(Reparametrised):
    """A layer with a pair around it."""

    def __init__(self, base: LinearMap, pair: Pair, scale: float, trains_a: bool) -> None:
        super().__init__(base)
        W = base.whole()
        A = pair.A.detach().to(W, copy=True)
        if trains_a:
            self.A = nn.Parameter(A)
        else:
            self.register_buffer("A", A)
        B = W.new_zeros(len(W), len(A)) if pair.B is None else pair.B.detach().to(W, copy=True)
        self.B = nn.Parameter(B)
        self.register_buffer("start", None if pair.B is None else B.clone())
        self.scale = scale
        self.start: Tensor | None

    def factors(self) -> tuple[Tensor, Tensor]:
        """Two factors, scale (B - B_0) (o, r) and A (r, d), of the change."""
        B = self.B if self.start is None else self.B - self.start
        return self.scale * B, self.A

    def change(self) -> Tensor:
        """Their product."""
        B, A = self.factors()
        return torch.mm(B, A)


def random_rows(like: LinearMap, rank: int, rng: Generator) -> Tensor:
    """A (r, d) as LoRA begins: uniform within 1 / sqrt(d)."""
    d = like.in_features
    return (2 * torch.rand(rank, d, generator=rng) - 1) / math.sqrt(d)
