"""Growing a basis until it explains a share of the energy of new inputs: GPM's threshold rule."""

import torch
from torch import Tensor

from cl_bench.subspace.basis import extend, rank_to_reach
from cl_bench.subspace.moments import Moments


def empty_basis(dim: int) -> Tensor:
    """A basis (dim, 0) of nothing."""
    return torch.zeros(dim, 0, dtype=torch.float64)


def grow(
    basis: Tensor | None, inputs: Moments, threshold: float, below: bool = False
) -> tuple[Tensor, Tensor]:
    """[M, U_r]: M and as many leading directions of (I - M M^T) R as the threshold asks for.

    Source: Saha, Garg & Roy (ICLR 2021), Eq. 5, 8 and 9.

    Args:
        basis: M (d, k), orthonormal; None is the empty basis.
        inputs: second moments of R (d, n).
        threshold: share of ||R||_F^2 that the grown basis explains, in (0, 1].
        below: leave the direction that crosses the threshold out.

    Returns:
        The grown basis (d, k + r), float64, M's columns first; and the squared singular values
        (r,) of the new directions, descending.
    """
    M = empty_basis(inputs.dim) if basis is None else basis
    explained = float(inputs.energy_along(M).sum()) / max(inputs.energy, 1e-300)
    S2, U = inputs.principal(outside=M)  # Eq. 8
    r = rank_to_reach(S2, inputs.energy, threshold, explained, below)  # Eq. 5 and 9
    grown = extend(M.to(U), U[:, :r])
    return grown, S2[: grown.shape[1] - M.shape[1]]
