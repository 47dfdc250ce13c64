"""How a merge treats one task's vector, on one weight."""

import torch
from torch import Tensor


def aligned_share(delta: Tensor, merged: Tensor, energy: float = 0.95) -> float:
    """|P delta| / |delta|, with P onto the merge's leading left singular directions.

    The subspace alignment ratio of Marczak et al. (2025).

    Args:
        delta: (m, n), the task vector.
        merged: (m, n), what the merge adds.
        energy: share of the merge's squared singular values that leading directions hold.

    Returns:
        In [0, 1]; 0 where one of them is zero.
    """
    u, s, _ = torch.linalg.svd(merged, full_matrices=False)
    held = s.square().cumsum(0)
    length = float(delta.norm())
    if length == 0 or held[-1] == 0:
        return 0.0
    rank = min(int((held < energy * held[-1]).sum()) + 1, len(s))
    return min(float((u[:, :rank].t() @ delta).norm()) / length, 1.0)


def contradicted_share(delta: Tensor, merged: Tensor) -> float:
    """The share of sum |delta| in entries where the merge has the other sign; in [0, 1]."""
    total = float(delta.abs().sum())
    return float(delta.abs()[delta * merged < 0].sum()) / total if total > 0 else 0.0


def cosine(delta: Tensor, merged: Tensor) -> float:
    """<delta, merged> / (|delta| |merged|), 0 where one of them is zero."""
    lengths = float(delta.norm() * merged.norm())
    return float((delta * merged).sum()) / lengths if lengths > 0 else 0.0
