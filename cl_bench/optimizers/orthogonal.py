"""The nearest matrix with orthonormal rows or columns, exactly and by Newton-Schulz steps."""

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Muon's coefficients (Jordan et al., 2024): singular values end near 1, not at it."""


def newton_schulz(M: Tensor, steps: int = 5) -> Tensor:
    """Five times X <- a X + (b A + c A^2) X with A = X X^T, from M / |M|, in M's own precision.

    An odd polynomial of M: rows and columns of the result span what those of M span.

    Args:
        M: (m, n).
        steps: iterations.
    """
    a, b, c = QUINTIC
    X: Tensor = M.t() if M.shape[0] > M.shape[1] else M
    X = X / X.norm().clamp_min(torch.finfo(X.dtype).tiny)
    for _ in range(steps):
        A = X @ X.t()
        X = a * X + (b * A + c * A @ A) @ X
    return X.t() if M.shape[0] > M.shape[1] else X


def polar(M: Tensor) -> Tensor:
    """U V^T of M = U S V^T (m, n), over singular values that are not zero but for rounding.

    Directions that M has nothing in stay empty: what an SVD says of them is arbitrary.
    """
    U, s, Vh = torch.linalg.svd(M, full_matrices=False)
    least = 10 * max(M.shape) * torch.finfo(M.dtype).eps * s[:1]
    factor: Tensor = (U * (s > least)) @ Vh
    return factor
