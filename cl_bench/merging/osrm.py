"""OSRM: the directions of a layer's inputs that other tasks use least.

Zhang & Zhou, "Unraveling LoRA interference: orthogonal subspaces for robust model merging",
arXiv:2505.22934. A pair B A that is learned on one task changes what a layer makes of another
task's input h by B A h; with rows of A where h has no energy, by nothing.
"""

import torch
from torch import Generator, Tensor

RESOLUTION = 1e-12
"""Energies below this share of the largest are none, in double precision."""


def osrm_rows(moments: Tensor, rank: int, rng: Generator) -> Tensor:
    """Orthonormal rows A (r, d) with least energy tr(A C A^T).

    Args:
        moments: C (d, d), of other tasks' inputs: the sum of their second moments, or of the outer
            products of their means.
        rank: r, at most d.
        rng: of the choice where more than r directions have no energy at all; on the CPU.

    Returns:
        In double precision. A C A^T is diagonal, of the r smallest eigenvalues of C.

    Raises:
        ValueError: r exceeds d.
    """
    if rank > len(moments):
        raise ValueError(f"rank={rank}: inputs have {len(moments)} dimensions")
    energies, directions = torch.linalg.eigh(moments.double())
    free = int((energies <= RESOLUTION * energies[-1]).sum())
    if free < rank:
        rows: Tensor = directions[:, :rank].t().contiguous()
        return rows
    draw = torch.randn(free, rank, generator=rng, dtype=torch.float64).to(directions.device)
    rows = (directions[:, :free] @ torch.linalg.qr(draw)[0]).t().contiguous()
    return rows
