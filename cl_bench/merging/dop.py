"""DOP: the merge and a new model pull at the weight along their own singular directions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cl_bench.merging.rule import Fold, Part, Rule, require


def truncated(delta: Tensor, energy: float) -> Tensor:
    """The singular triplets that come before the summed share of ``energy`` is reached."""
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    # the first triplet at least: the share of a matrix of rank 1 is reached with it
    rank = max(int((s.cumsum(0) < energy * s.sum()).sum()), 1) if energy < 1 else len(s)
    found: Tensor = u[:, :rank] * s[:rank] @ vh[:rank]
    return found


def balanced(deltas: Sequence[Tensor], weights: Sequence[float], energy: float) -> Tensor:
    """The D that minimises sum_i a_i (|S_i U_i^T (D - D_i)|^2 + |(D - D_i) V_i S_i|^2).

    U_i S_i V_i^T is D_i, truncated. The gradient is zero where A D + D B = C, with A = sum a D_i
    D_i^T, B = sum a D_i^T D_i: a Sylvester equation, solved in double precision. What no term looks
    at stays as in the plain mean.

    Args:
        deltas: the D_i, each (m, n).
        weights: the a_i, at least 0.
        energy: see :func:`truncated`.
    """
    wide = [delta.double() for delta in deltas]
    start = torch.stack(wide).mean(0)
    left = torch.zeros(start.shape[0], start.shape[0], dtype=start.dtype, device=start.device)
    right = torch.zeros(start.shape[1], start.shape[1], dtype=start.dtype, device=start.device)
    rest = torch.zeros_like(start)
    for delta, weight in zip(wide, weights, strict=True):
        short = truncated(delta, energy)
        a, b = weight * short @ short.t(), weight * short.t() @ short
        left, right = left + a, right + b
        rest = rest + a @ (delta - start) + (delta - start) @ b
    values_left, vectors_left = torch.linalg.eigh(left)
    values_right, vectors_right = torch.linalg.eigh(right)
    sums = values_left[:, None].clamp(min=0) + values_right[None].clamp(min=0)
    seen = sums > 1e-13 * sums.max()
    inner = vectors_left.t() @ rest @ vectors_right
    inner = torch.where(seen, inner / torch.where(seen, sums, 1), 0)
    found: Tensor = start + vectors_left @ inner @ vectors_right.t()
    return found.to(deltas[0].dtype)


@dataclass(frozen=True)
class Dop(Rule):
    """Dual orthogonal projection, the closed form for fixed weights.

    Folds in one tensor a weight, by its definition; the order of the models counts. The published
    code finds the weights of the two terms while it descends, from (0.8, 0.2); here they stay.
    Weights that are no matrices are the mean of the merge and the new model. With one model it
    gives that model.

    Attributes:
        stability: the weight of the merge; the new model's is 1 - stability.
        energy: share of summed singular values up to which directions count.
    """

    folds = True
    stability: float = 0.8
    energy: float = 0.99999

    def __post_init__(self) -> None:
        require("stability", self.stability, "[0, 1]", 0 <= self.stability <= 1)
        require("energy", self.energy, "(0, 1]", 0 < self.energy <= 1)

    def fold(self, fold: Fold, delta: Tensor, part: Part) -> Fold:
        """The new merge."""
        if not fold:
            return {"merge": delta.clone()}
        if not part.matrix:
            return {"merge": (fold["merge"] + delta) / 2}
        weights = (self.stability, 1 - self.stability)
        return {"merge": balanced((fold["merge"], delta), weights, self.energy)}

    def merged(self, fold: Fold, part: Part) -> Tensor:
        """The merge."""
        return fold["merge"]
