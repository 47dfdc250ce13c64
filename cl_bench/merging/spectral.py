"""Rules that make a new spectrum: Iso-C, Iso-CTS, TSV-M. They treat vectors by their mean."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cl_bench.merging.rule import (
    Fold,
    Part,
    Rule,
    added,
    kept,
    kept_fold,
    mean,
    mean_fold,
    require,
)


def flattened(matrix: Tensor, cut: float = 0.0) -> Tensor:
    """The matrix with all singular values equal to their mean.

    Args:
        matrix: (m, n).
        cut: singular values below this share of the largest are left out, and stay zero.
    """
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((s > cut * s[0]).sum()) if s.numel() else 0
    if rank == 0:
        return torch.zeros_like(matrix)
    flat: Tensor = s[:rank].mean() * (u[:, :rank] @ vh[:rank])
    return flat


def polar(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (or rows): U V^T."""
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    found: Tensor = u @ vh
    return found


def singular_vectors_merged(deltas: Sequence[Tensor]) -> Tensor:
    """TSV-M of matrices (m, n): every task's top singular triplets, made orthogonal to each other.

    Of T tasks each keeps int(min(m, n) / T) triplets, and one at least. (Of more tasks than there
    are singular values the published code keeps none, and the matrix stays what it was at first.)
    """
    count = max(min(deltas[0].shape) // len(deltas), 1)
    parts = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    u = torch.cat([u[:, :count] for u, _, _ in parts], dim=1)
    s = torch.cat([s[:count] for _, s, _ in parts])
    vh = torch.cat([vh[:count] for _, _, vh in parts])
    return polar(u) * s @ polar(vh)


def common_and_specific(deltas: Sequence[Tensor], common: float) -> Tensor:
    """Iso-CTS of matrices (m, n).

    A flat spectrum on the sum's top directions, and on directions of each task outside of them.

    Args:
        deltas: the task vectors.
        common: share of the directions that are the sum's, rounded so that tasks get equally many.
    """
    tasks, least = len(deltas), min(deltas[0].shape)
    specific = round((least - int(least * common)) / tasks) * tasks
    # rounding up can ask for more directions than there are
    specific = min(specific, least // tasks * tasks)
    shared, each = least - specific, specific // tasks
    u, s, vh = torch.linalg.svd(torch.stack(list(deltas)).sum(0), full_matrices=False)
    u, s, vh = u[:, :shared], s[:shared], vh[:shared]
    parts = [torch.linalg.svd(d - u @ (u.t() @ d), full_matrices=False) for d in deltas]
    us = torch.cat([*(p[0][:, :each] for p in parts), u], dim=1)
    values = torch.cat([*(p[1][:each] for p in parts), s])
    vs = torch.cat([*(p[2][:each] for p in parts), vh])
    return values.mean() * (polar(us) @ polar(vs))


@dataclass(frozen=True)
class IsoC(Rule):
    """The summed task vector with a flat spectrum (Marczak et al., 2025, Algorithm 1).

    Folds exactly; one tensor a weight. With one model it gives that model's spectrum flattened.

    Attributes:
        rank_cut: singular values below this share of the largest stay zero, so that directions in
            which no task moved (of low-rank updates, dead units) get nothing; 0 is the authors'
            form, which fills them.
    """

    folds = True
    rank_cut: float = 1e-6

    def __post_init__(self) -> None:
        require("rank_cut", self.rank_cut, "[0, 1)", 0 <= self.rank_cut < 1)

    def fold(self, fold: Fold, delta: Tensor, part: Part) -> Fold:
        """The sum, of vectors with the count."""
        return {"sum": added(fold, delta)} if part.matrix else mean_fold(fold, delta)

    def merged(self, fold: Fold, part: Part) -> Tensor:
        """Flat."""
        return flattened(fold["sum"], self.rank_cut) if part.matrix else mean(fold)


@dataclass(frozen=True)
class IsoCts(Rule):
    """Common and task-specific directions, all equally strong (Marczak et al., 2025, Algorithm 2).

    Keeps every task vector of matrices: it does not fold.

    Attributes:
        common: share of the directions that are those of the sum.
    """

    folds = False
    common: float = 0.8

    def __post_init__(self) -> None:
        require("common", self.common, "[0, 1]", 0 <= self.common <= 1)

    def fold(self, fold: Fold, delta: Tensor, part: Part) -> Fold:
        """All of them; of vectors the mean."""
        return kept_fold(fold, delta) if part.matrix else mean_fold(fold, delta)

    def merged(self, fold: Fold, part: Part) -> Tensor:
        """Algorithm 2."""
        return common_and_specific(kept(fold), self.common) if part.matrix else mean(fold)


@dataclass(frozen=True)
class TsvM(Rule):
    """Task singular vectors, made orthogonal and summed (Gargiulo et al., CVPR 2025).

    Keeps every task vector of matrices: how many triplets a task keeps depends on how many tasks
    there are. With one model it gives that model.
    """

    folds = False

    def fold(self, fold: Fold, delta: Tensor, part: Part) -> Fold:
        """All of them; of vectors the mean."""
        return kept_fold(fold, delta) if part.matrix else mean_fold(fold, delta)

    def merged(self, fold: Fold, part: Part) -> Tensor:
        """See :func:`singular_vectors_merged`."""
        return singular_vectors_merged(kept(fold)) if part.matrix else mean(fold)
