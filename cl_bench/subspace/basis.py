"""Growing an orthonormal basis by an energy criterion."""

from typing import Literal

import torch
from torch import Tensor

RESOLUTION = 1e-6
"""Singular values below this share of the Frobenius norm are rounding, not directions."""

RankRule = Literal["official", "energy"]


def rank_to_reach(
    energies: Tensor, total: float, threshold: float, explained: float = 0.0, below: bool = False
) -> int:
    """How many leading directions bring the explained share of energy to ``threshold``.

    Args:
        energies: (r,) energies of the candidate directions, descending.
        total: energy of everything, the part that is already explained included.
        threshold: share of ``total`` to reach, in (0, 1].
        explained: share of ``total`` that is explained before the first direction.
        below: stop *before* the direction that crosses the threshold (what the authors' GPM code
            does on its first task) instead of taking it in.

    Returns:
        The smallest r with ``explained + sum(energies[:r]) / total >= threshold``, at most
        ``len(energies)``; with ``below`` the number of prefixes that stay short of it. A threshold
        of 1 leaves nothing out, neither by rounding nor by ``below``.
    """
    if total > 0.0 and threshold >= 1.0:
        return len(energies)
    if total <= 0.0 or (explained >= threshold and not below):
        return 0
    reached = explained + energies.cumsum(0) / total
    short = int((reached < threshold).sum())
    return short if below else min(short + 1, len(energies))


def extend(basis: Tensor, directions: Tensor) -> Tensor:
    """[M, U] (d, k + r) with orthonormal columns; never more than d of them.

    ``basis`` keeps its columns bit for bit; ``directions`` are orthogonalised against it.
    """
    d, k = basis.shape
    directions = directions[:, : d - k].to(basis.dtype)
    if directions.shape[1] == 0:
        return basis
    for _ in range(2):
        directions = directions - basis @ (basis.t() @ directions)
        directions, triangle = torch.linalg.qr(directions)
        directions = directions * triangle.diagonal().sign()
    return torch.cat([basis, directions], dim=1)


def extend_to_span(basis: Tensor, vectors: Tensor) -> Tensor:
    """[M, U] (d, k + r) with orthonormal columns that span M and all of ``vectors`` (d, n).

    ``basis`` keeps its columns bit for bit. What is left of the vectors beside M and is below
    1e-6 of their length is rounding and adds no direction.
    """
    scale, old, left = torch.linalg.matrix_norm(vectors.double()), basis.double(), vectors.double()
    for _ in range(2):
        left = left - old @ (old.t() @ left)
    directions, values, _ = torch.linalg.svd(left, full_matrices=False)
    new = directions[:, values > RESOLUTION * scale].to(basis.dtype)
    return torch.cat([basis, new], dim=1)


def complement(basis: Tensor) -> Tensor:
    """Orthonormal N (d, d - k) with span(N) = span(M)^perp, for orthonormal M (d, k)."""
    q, _ = torch.linalg.qr(basis, mode="complete")
    complete: Tensor = q
    return complete[:, basis.shape[1] :].contiguous()


def complement_within(basis: Tensor, part: Tensor) -> Tensor:
    """Orthonormal (d, k - q) spanning what span(M) holds beside span(B).

    Args:
        basis: M (d, k), orthonormal.
        part: B (d, q), orthonormal, inside span(M).
    """
    return basis @ complement(basis.t() @ part.to(basis))
