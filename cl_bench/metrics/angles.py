"""Principal subspaces of two weight changes, and the angles between them.

Zheng et al., "Spurious Forgetting in Continual Learning of Language Models", ICLR 2025, compare the
updates of two phases of training layer by layer. What they leave out and what an angle means
nothing without is its null: a random subspace of dimension r in R^m holds r/m of a random vector on
average, so where r is a large part of m a small angle says nothing.

An update is a matrix A (m, n) whose columns live in the space that is compared (R^m).
"""

import math

import torch
from torch import Tensor

ENERGY = 0.99
"""Share of ||A||_F^2 that the principal subspace of an update holds."""


def principal_subspace(update: Tensor, energy: float = ENERGY, standardise: bool = False) -> Tensor:
    """Leading left singular vectors (m, r), with the smallest r that reaches ``energy``.

    Args:
        update: A (m, n).
        energy: share of ||A||_F^2 that the r directions hold, in (0, 1].
        standardise: first subtract the mean of all entries and divide by their deviation, as the
            authors' code does. That adds a rank-one term and turns the column space; it is here for
            comparisons with their numbers only.

    Returns:
        float64 (m, r) with orthonormal columns; r = 0 for A = 0.
    """
    A = update.double()
    if standardise and A.numel() > 1 and float(A.std()) > 0:
        A = (A - A.mean()) / A.std()
    if not bool(A.any()):
        return A.new_zeros(len(A), 0)
    if energy < 1 and A.shape[1] > 2 * A.shape[0]:
        # What is kept holds more than rounding in A A^T could hide, and that is much smaller.
        values, vectors = torch.linalg.eigh(A @ A.t())
        U, S2 = vectors.flip(1), values.flip(0).clamp_min(0)
    else:
        U, S, _ = torch.linalg.svd(A, full_matrices=False)
        S2 = S.square()
    held = S2.cumsum(0)
    # Rounding in the last sum must not ask for one direction more than there are.
    r = min(int((held < energy * held[-1] * (1 - 1e-12)).sum()) + 1, len(S2))
    principal: Tensor = U[:, :r]
    return principal


def subspace_angles(basis: Tensor, other: Tensor) -> Tensor:
    """Angle in degrees, in [0, 90], between every column of ``other`` and span(``basis``).

    Args:
        basis: U_A (m, r_A), orthonormal.
        other: U_B (m, r_B), orthonormal.

    Returns:
        (r_B,): arccos ||U_A^T u||, computed so that it is exact near 0 as well.
    """
    inside = basis.t() @ other
    outside = other - basis @ inside
    return torch.rad2deg(torch.atan2(outside.norm(dim=0), inside.norm(dim=0)))


def overlap(basis: Tensor, other: Tensor) -> float:
    """Mean over the columns u of ``other`` of ||U_A^T u||^2; NaN if either has none."""
    if basis.shape[1] == 0 or other.shape[1] == 0:
        return math.nan
    return float((basis.t() @ other).square().sum()) / other.shape[1]


def null_overlap(rank: int, dimension: int) -> float:
    """E ||U^T u||^2 = r/m for a random subspace of dimension r in R^m."""
    return rank / dimension


def null_angle(rank: int, dimension: int) -> float:
    """Arccos sqrt(r/m) in degrees: the angle between a random vector and a random subspace."""
    return math.degrees(math.acos(math.sqrt(null_overlap(rank, dimension))))


def overlap_excess(basis: Tensor, other: Tensor) -> float:
    """(overlap - r_A/m) / (1 - r_A/m): 1 for one space, 0 for chance, below 0 for avoidance.

    NaN where U_A is all of R^m, which holds everything, or where either space is empty.
    """
    m, r = basis.shape
    return math.nan if r == m else (overlap(basis, other) - r / m) / (1 - r / m)


def compare_subspaces(basis: Tensor, other: Tensor) -> dict[str, float]:
    """Everything above by name; angles are NaN where an update is zero.

    Returns:
        ``theta_mean``, ``theta_q25``, ``theta_median``, ``theta_q75``, ``theta_max``,
        ``theta_null`` (degrees), ``overlap``, ``overlap_excess``, ``rank_a``, ``rank_b``.
    """
    m, r = basis.shape
    found = {"rank_a": float(r), "rank_b": float(other.shape[1])}
    if r == 0 or other.shape[1] == 0:
        names = ("mean", "q25", "median", "q75", "max", "null")
        return {f"theta_{n}": math.nan for n in names} | {
            "overlap": math.nan,
            "overlap_excess": math.nan,
            **found,
        }
    angles = subspace_angles(basis, other)
    quartiles = torch.quantile(angles, angles.new_tensor([0.25, 0.5, 0.75])).tolist()
    return {
        "theta_mean": float(angles.mean()),
        "theta_q25": quartiles[0],
        "theta_median": quartiles[1],
        "theta_q75": quartiles[2],
        "theta_max": float(angles.max()),
        "theta_null": null_angle(r, m),
        "overlap": overlap(basis, other),
        "overlap_excess": overlap_excess(basis, other),
        **found,
    }


def flat_cosine(update: Tensor, other: Tensor) -> float:
    """<A, B> / (||A|| ||B||): 1 for one direction, -1 for undoing; NaN if either is zero."""
    a, b = update.double().flatten(), other.double().flatten()
    norms = float(a.norm() * b.norm())
    return float(a @ b) / norms if norms > 0 else math.nan
