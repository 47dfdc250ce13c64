"""OPCM: a new task vector loses what lies along the merge so far (Tang et al., 2025).

The published step is W_t = W_0 + (lambda_{t-1} (W_{t-1} - W_0) + P(tau_t)) / lambda_t. As
lambda_{t-1} (W_{t-1} - W_0) is the numerator of the step before, that is a sum X_t = X_{t-1} +
P(tau_t), divided by lambda_t = |X_t| / mean |tau|. P depends on the directions of X_{t-1} alone.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cl_bench.merging.rule import Deltas, Fold, Part, Rule, added, require

NULL = 1e-6
"""Singular values below this share of the largest belong to the null space."""


def leading(s: Tensor, alpha: float) -> int:
    """How many singular values come before the one at which their summed share exceeds alpha."""
    summed = s.cumsum(0)
    over = summed > alpha * summed[-1]  # never for alpha = 1
    return int(over.int().argmax()) if bool(over.any()) else len(s)


def projected(merge: Tensor, delta: Tensor, alpha: float) -> Tensor:
    """P(delta): without the diagonal and the leading block in the merge's singular bases.

    The thin form: with Z = U^T delta V of the full bases, entries of the diagonal and of Z[:r, :r]
    are subtracted, so the other rows and columns of the full bases are never made. Where the merge
    is of lower rank, the bases of its null space are arbitrary, and with them the diagonal there:
    it stays, while the published code takes it away.

    Args:
        merge: (m, n), what is merged so far, times anything.
        delta: (m, n), the new task vector.
        alpha: r singular values are leading; see :func:`leading`.
    """
    if merge.shape[0] > merge.shape[1]:
        return projected(merge.t(), delta.t(), alpha).t()
    u, s, vh = bases(merge)
    r = leading(s, alpha) if len(s) else 0
    right = delta @ vh.t()
    diagonal = (u * right).sum(0)
    block = u[:, :r].t() @ right[:, :r]
    block.diagonal().zero_()
    closed: Tensor = u * diagonal @ vh + u[:, :r] @ block @ vh[:r]
    return delta - closed


def bases(merge: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, k), S (k,), V^T (k, n) of a matrix (m, n) of rank k, m <= n, its null space left out.

    Below float64, of the eigenvectors of X X^T in float64: quicker than a decomposition of X, and
    no less exact, for what a square takes of the digits is there to spare.
    """
    if merge.dtype == torch.float64:
        u, s, vh = torch.linalg.svd(merge, full_matrices=False)
        rank = int((s > NULL * s[0]).sum())
        return u[:, :rank], s[:rank], vh[:rank]
    double = merge.double()
    squares, u = torch.linalg.eigh(double @ double.t())
    s = squares.flip(0).clamp(min=0).sqrt()
    rank = int((s > NULL * s[0]).sum())
    u, s = u.flip(1)[:, :rank], s[:rank]
    vh = (u.t() @ double) / s[:, None]
    return u.to(merge.dtype), s, vh.to(merge.dtype)


@dataclass(frozen=True)
class Opcm(Rule):
    """Orthogonal projection-based continual merging.

    Folds in one tensor a weight, by its definition; the order of the models counts. The merged
    task vector is as long as the models' are on average. Weights that are no matrices are added up
    unprojected. With one model it gives that model.

    Attributes:
        alpha: share of the merge's summed singular values whose directions are closed to what
            comes.
    """

    folds = True
    measures = True
    normed = True
    alpha: float = 0.5

    def __post_init__(self) -> None:
        require("alpha", self.alpha, "[0, 1]", 0 <= self.alpha <= 1)

    def measure(self, deltas: Deltas) -> float:
        """The norm of the model's whole task vector."""
        return math.sqrt(sum(float(delta.double().square().sum()) for _, delta in deltas()))

    def fold(self, fold: Fold, delta: Tensor, part: Part) -> Fold:
        """X_t."""
        if fold and part.matrix:
            delta = projected(fold["sum"], delta, self.alpha)
        return {"sum": added(fold, delta)}

    def merged(self, fold: Fold, part: Part) -> Tensor:
        """X_t, to be divided by lambda_t."""
        return fold["sum"]

    def factor(self, norm: float, measure: float) -> float:
        """1 / lambda_t."""
        return self.scale * measure / norm if norm > 0 else self.scale
