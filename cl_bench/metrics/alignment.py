"""Formulas that relate a weight update to subspaces."""

import math

import torch
from torch import Tensor


def share_inside(rows: Tensor, basis: Tensor) -> float:
    """||A M||_F^2 / ||A||_F^2: share of a matrix (o, d) inside span(M), M (d, k) orthonormal.

    0 where A acts on nothing the old tasks used, 1 where it acts on nothing else; NaN for A = 0.
    For a random A it is k / d on average.
    """
    whole = float(rows.double().square().sum())
    if whole == 0.0:
        return float("nan")
    return float((rows.double() @ basis.double()).square().sum()) / whole


def relative_change(before: Tensor, after: Tensor) -> float:
    """||W' - W||_F / ||W||_F; NaN for W = 0."""
    norm = float(torch.linalg.vector_norm(before.double()))
    change = float(torch.linalg.vector_norm(after.double() - before.double()))
    return change / norm if norm > 0 else float("nan")


def unprotected_share(update: Tensor, weight: Tensor, preserve_ratio: float) -> float:
    """||P_U D P_V||_F / ||D||_F: part of an update D (o, d) that W's large directions leave free.

    P_U = I - U U^T and P_V = I - V V^T, where U and V are the first k = floor(ratio min(o, d)) left
    and right singular vectors of W (o, d). A method that freezes those k of the weights a task ends
    with lets the next task overwrite just this part of what the task has learned. NaN for D = 0;
    where W has a rank below k, the remaining directions are any that complete them.

    Args:
        update: what the task added to the weight.
        weight: W after the task, the update included.
        preserve_ratio: share of the singular directions, in [0, 1].
    """
    D, W = update.double(), weight.double()
    if W.shape[0] < W.shape[1]:
        D, W = D.t(), W.t()
    size = float(torch.linalg.matrix_norm(D))
    if size == 0.0:
        return float("nan")
    k = preserved_directions(preserve_ratio, *W.shape)
    # The small Gram matrix in double precision is several times cheaper than W's own decomposition.
    V = torch.linalg.eigh(W.t() @ W).eigenvectors[:, W.shape[1] - k :]
    U = torch.linalg.qr(W @ V).Q
    free = D - (D @ V) @ V.t()
    free = free - U @ (U.t() @ free)
    return float(torch.linalg.matrix_norm(free)) / size


def unprotected_by_chance(rows: int, columns: int, preserve_ratio: float) -> float:
    """Root of the mean squared :func:`unprotected_share` of random updates (rows, columns)."""
    k = preserved_directions(preserve_ratio, rows, columns)
    return math.sqrt((1 - k / rows) * (1 - k / columns))


def preserved_directions(ratio: float, rows: int, columns: int) -> int:
    """How many directions count: floor(ratio min(rows, columns)), rounding errors apart."""
    return math.floor(ratio * min(rows, columns) + 1e-9)
