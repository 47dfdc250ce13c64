"""Ridge regression from sums: of the data only G = H^T H and Q = H^T Y are known.

H (n, M) are inputs, Y (n, C) one-hot labels. Sums over batches, tasks, processes and clients add
up, so that W = (G + lambda I)^-1 Q is the same for any division and any order of the samples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

BLOCK = 512
"""Columns of a block; blocks of G above the diagonal are left at 0."""


@dataclass(frozen=True)
class Sums:
    """Of some samples.

    Attributes:
        gram: G (M, M) float64; of its blocks those on and below the diagonal.
        cross: Q (M, C).
        count: how many samples; what ||Y||_F^2 is.
    """

    gram: Tensor
    cross: Tensor
    count: float

    def __add__(self, other: Self) -> "Sums":
        """Of both."""
        return Sums(self.gram + other.gram, self.cross + other.cross, self.count + other.count)

    def against(self, W: Tensor) -> Tensor:
        """G W (M, C)."""
        found = torch.empty_like(W)
        for rows, columns in block_rows(len(W)):
            found[rows] = self.gram[rows, columns] @ W[columns]
            found[: rows.start].addmm_(self.gram[rows, : rows.start].t(), W[rows])
        return found


def block_rows(M: int) -> list[tuple[slice, slice]]:
    """Rows and columns of the parts of G that are kept."""
    starts = range(0, M, BLOCK)
    return [(slice(start, start + BLOCK), slice(start + BLOCK)) for start in starts]


def add_gram(gram: Tensor, h: Tensor) -> None:
    """Add h^T h of rows ``h`` (n, M) to the kept blocks of ``gram`` (M, M)."""
    for rows, columns in block_rows(len(gram)):
        gram[rows, columns].addmm_(h[:, rows].t(), h[:, columns])


def factor(sums: Sums, strength: float) -> Tensor | None:
    """Cholesky factor of G + lambda I; None if that is singular to working precision."""
    shifted = sums.gram.clone()
    shifted.diagonal().add_(strength)
    found, failed = torch.linalg.cholesky_ex(shifted)  # reads the lower triangle
    return None if int(failed) else found


def solve_ridge(sums: Sums, strength: float) -> Tensor | None:
    """W (M, C); None if G + lambda I is singular to working precision."""
    found = factor(sums, strength)
    return None if found is None else torch.cholesky_solve(sums.cross, found)


def held_out(fit: Sums, held: Sums, strength: float) -> tuple[float, float]:
    """The squared error ||H W - Y||_F^2 on ``held`` of W fitted on ``fit``, and its slope.

    E = tr(W^T (G W - 2 Q)) + n and dE / d lambda = -2 tr((G W - Q)^T (G_fit + lambda I)^-1 W), G
    and Q those of ``held``. Where W does not exist, E is infinite, falling.
    """
    found = factor(fit, strength)
    if found is None:
        return math.inf, -math.inf
    W = torch.cholesky_solve(fit.cross, found)
    GW = held.against(W)
    error = float((W * (GW - 2 * held.cross)).sum()) + held.count
    slope = -2 * float(((GW - held.cross) * torch.cholesky_solve(W, found)).sum())
    return error, slope


def chosen(fit: Sums, held: Sums, strengths: Sequence[float]) -> float:
    """The strength, fitted on ``fit``, that errs least on ``held``.

    Of rising ``strengths`` the first is looked at that is nearest to the mean eigenvalue of the
    fit's G, then its neighbours, down the slope, until that turns: the better one of the two around
    a minimum, the larger one of equals. Two or three systems are solved, not one for each. Where
    nothing is held out, it is the strength looked at first.
    """
    scale = math.log(max(float(fit.gram.diagonal().mean()), math.ulp(0.0)))
    at = min(range(len(strengths)), key=lambda i: abs(math.log(strengths[i]) - scale))
    if not held.count:
        return strengths[at]
    error, slope = held_out(fit, held, strengths[at])
    step = -1 if slope > 0 else 1
    while 0 <= at + step < len(strengths):
        other, slope = held_out(fit, held, strengths[at + step])
        if (other, -step) > (error, step):
            break
        at, error = at + step, other
        if slope * step > 0:
            break
    return strengths[at]
