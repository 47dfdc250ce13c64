"""What an update did to subspaces: formulas on tensors."""

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
