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
"""Columns of a block of G; blocks above the diagonal are not computed."""


@dataclass(frozen=True)
class Sums:
    """Of some samples.

    Attributes:
        gram: G (M, M), float64.
        cross: Q (M, C).
        count: how many samples; what ||Y||_F^2 is.
    """

    gram: Tensor
    cross: Tensor
    count: float

    def __add__(self, other: Self) -> "Sums":
        """Of both."""
        return Sums(self.gram + other.gram, self.cross + other.cross, self.count + other.count)


def add_gram(gram: Tensor, h: Tensor) -> None:
    """Add h^T h of rows ``h`` (n, M) to the blocks of ``gram`` on the diagonal and below it."""
    for start in range(0, len(gram), BLOCK):
        stop = start + BLOCK
        gram[start:stop, :stop].addmm_(h[:, start:stop].t(), h[:, :stop])


def mirrored(gram: Tensor) -> Tensor:
    """The symmetric matrices whose diagonals and lower triangles these are."""
    return gram.tril() + gram.tril(-1).mT


def ridge(sums: Sums, strength: float) -> Tensor | None:
    """W (M, C); None if G + lambda I is singular to working precision."""
    shifted = sums.gram.clone()
    shifted.diagonal().add_(strength)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    return None if int(failed) else torch.cholesky_solve(sums.cross, factor)


def squared_error(W: Tensor, sums: Sums) -> float:
    """||H W - Y||_F^2 = tr(W^T G W) - 2 tr(W^T Q) + n."""
    return float((W * (sums.gram @ W - 2 * sums.cross)).sum()) + sums.count


def chosen(fit: Sums, held: Sums, strengths: Sequence[float]) -> float:
    """The strength, fitted on ``fit``, that errs least on ``held``.

    Of rising ``strengths`` it is the nearest minimum, as seen from the mean eigenvalue of the
    fit's G: three or four systems are solved, not one for each. Of equals the larger one is taken;
    where nothing is held, the one that is nearest to that eigenvalue.
    """
    found: dict[int, float] = {}

    def error(i: int) -> tuple[float, int]:
        if i not in found:
            W = ridge(fit, strengths[i])
            found[i] = math.inf if W is None else squared_error(W, held)
        return found[i], -i

    scale = math.log(max(float(fit.gram.diagonal().mean()), math.ulp(0.0)))
    at = min(range(len(strengths)), key=lambda i: abs(math.log(strengths[i]) - scale))
    while held.count:
        around = range(max(at - 1, 0), min(at + 2, len(strengths)))
        best = min(around, key=error)
        if best == at:
            break
        at = best
    return strengths[at]
