"""Low-rank directions of old tasks with strengths that train, and a pair of the new task's.

W + sum_i a_i B_i A_i / (||B_i|| ||A_i||) + a B A: directions are frozen, the strengths are numbers
that all layers share.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cl_bench.adapters.reparametrised import Reparametrisation, Reparametrised
from cl_bench.subspace import LinearMap

Factors = tuple[Tensor, Tensor]


@dataclass
class Directions(Reparametrisation):
    """What every layer adds.

    Args:
        old: B_i (o, r) and A_i (r, d) of old tasks, each of norm 1, by layer.
        new: A (r, d) of the new pair, by layer; B begins at zero.
        strengths: a_i, with a last; one parameter for all layers.
    """

    old: Mapping[str, Sequence[Factors]]
    new: Mapping[str, Tensor]
    strengths: nn.Parameter

    def layer(self, base: LinearMap, seen: Tensor | None) -> Reparametrised:
        """The sum around a layer."""
        return DirectionsLayer(
            base, self.old.get(base.name, ()), self.new[base.name], self.strengths
        )


class DirectionsLayer(Reparametrised):
    """A layer with all directions around it."""

    def __init__(
        self, base: LinearMap, old: Sequence[Factors], A: Tensor, strengths: nn.Parameter
    ) -> None:
        super().__init__(base)
        W = base.whole()
        # One matrix each: what stands in row block i of A is read, and column block i of B written.
        if old:
            self.register_buffer("old_B", torch.cat([b.to(W) for b, _ in old], dim=1))
            self.register_buffer("old_A", torch.cat([a.to(W) for _, a in old], dim=0))
        self.ranks = [len(a) for _, a in old]
        self.A = nn.Parameter(A.detach().to(W, copy=True))
        self.B = nn.Parameter(W.new_zeros(len(W), len(A)))
        self.strengths = strengths
        self.old_A: Tensor
        self.old_B: Tensor

    def change(self) -> Tensor:
        """The sum."""
        found: Tensor = self.strengths[-1] * self.B @ self.A
        if self.ranks:
            each = [a.expand(r) for a, r in zip(self.strengths, self.ranks, strict=False)]
            found = found + (self.old_B * torch.cat(each)) @ self.old_A
        return found
