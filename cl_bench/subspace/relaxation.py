"""Which part of a frozen subspace a gradient asks for: splitting by principal angles."""

import torch
from torch import Tensor

from cl_bench.subspace.basis import rank_to_reach
from cl_bench.subspace.moments import Moments


def leading_directions(rows: Tensor, threshold: float) -> Tensor:
    """Leading right singular vectors of a matrix, until they hold a share of its energy.

    Args:
        rows: (n, d), a layer's gradient for instance.
        threshold: the share, in (0, 1]; the direction that crosses it is taken in.

    Returns:
        Orthonormal (d, r), float64; r >= 1 unless ``rows`` is zero.
    """
    moments = Moments(rows.shape[1])
    moments.add(rows)
    S2, U = moments.principal()
    return U[:, : rank_to_reach(S2, moments.energy, threshold)]


def split_by_angle(frozen: Tensor, directions: Tensor, cosine: float) -> tuple[Tensor, Tensor]:
    """Split span(F) into what lies close to span(U) and the rest.

    Taking the unit vector of span(F) with the largest ||U^T u|| again and again, until none reaches
    ``cosine``, has a closed form: in the SVD U^T F = A diag(c) V^T the c are the cosines of the
    principal angles, and F V are the vectors.

    Args:
        frozen: F (d, k), orthonormal.
        directions: U (d, r), orthonormal.
        cosine: least ||U^T u|| of what is split off, in (0, 1].

    Returns:
        ``(close, rest)``: (d, q) and (d, k - q), orthonormal together, spanning span(F).
    """
    if frozen.shape[1] == 0 or directions.shape[1] == 0:
        return frozen[:, :0], frozen
    _, c, Vh = torch.linalg.svd(directions.t() @ frozen)
    q = int((c >= cosine).sum())
    if q == 0:
        return frozen[:, :0], frozen
    turned = frozen @ Vh.t()
    return turned[:, :q], turned[:, q:]


def split_as_published(frozen: Tensor, directions: Tensor, cosine: float) -> tuple[Tensor, Tensor]:
    """:func:`split_by_angle` with the defect of ROGO's published code (``update_space``).

    A candidate that fails the test stays in ``rest`` in place of one of its columns, so ``rest`` is
    no longer orthonormal and a later call finds fewer directions in it. Shapes as there.
    """
    close = []
    while frozen.shape[1] > 0 and directions.shape[1] > 0:
        _, _, Vh = torch.linalg.svd(directions.t() @ frozen)
        u = frozen @ Vh[0]
        u = u / u.norm()
        replaced = int(Vh[0].nonzero()[0])
        others = torch.cat([frozen[:, :replaced], frozen[:, replaced + 1 :]], dim=1)
        frozen = torch.cat([u[:, None], others], dim=1)
        if (directions.t() @ u).norm() < cosine:
            break
        orthonormal, _ = torch.linalg.qr(frozen)
        close.append(u)
        frozen = orthonormal[:, 1:]
    found = torch.stack(close, dim=1) if close else frozen[:, :0]
    return found, frozen
