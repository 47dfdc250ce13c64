"""Set-level scores: whether the nearest sample has the same class, for embeddings of two models.

Queries q and gallery g hold the same samples, in the same order, embedded by models that may
differ; a sample is never found as itself. Similarity is the cosine. Where lengths differ, queries
are cut to the gallery's first dimensions, where a compatible model keeps what the old one said.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def ranked(queries: Tensor, gallery: Tensor, labels: Tensor) -> Tensor:
    """Whether each of a query's neighbours, the nearest first, is of its class: bool (n, n - 1)."""
    width = gallery.shape[1]
    near = (
        F.normalize(queries.double()[:, :width], dim=1) @ F.normalize(gallery.double(), dim=1).t()
    )
    near.fill_diagonal_(-torch.inf)
    order = near.argsort(dim=1, descending=True, stable=True)[:, :-1]
    return labels[order] == labels[:, None]


def cmc1(hits: Tensor) -> float:
    """CMC@1: share of queries whose nearest neighbour is of their class."""
    return float(hits[:, 0].double().mean())


def mean_average_precision(hits: Tensor) -> float:
    """MAP: precision at each neighbour of the class, averaged over those, then over queries.

    Queries that are alone in their class do not count.
    """
    places = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    precision = hits.double().cumsum(1) / places
    count = hits.sum(1)
    some = count > 0
    if not bool(some.any()):
        return math.nan
    return float(((precision * hits).sum(1)[some] / count[some]).mean())


def compatibility(M: Sequence[Sequence[float]]) -> dict[str, float]:
    """What scores M[i][j] of queries of model i in galleries of models j <= i come to.

    Returns:
        ``compatible``: share of pairs j < i with M[i][j] > M[j][j], the empirical criterion: a new
        model finds more in an old gallery than the old model did; ``multi_model``: mean of all
        M[i][j]; ``self``: mean of M[i][i]; ``backward``: mean of M[i][j] - M[j][j] over j < i. NaN
        where there are no pairs.
    """
    pairs = [(i, j) for i in range(len(M)) for j in range(i)]
    cells = [value for row in M for value in row]

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values) if values else math.nan

    return {
        "compatible": mean([float(M[i][j] > M[j][j]) for i, j in pairs]),
        "multi_model": mean(cells),
        "self": mean([M[i][i] for i in range(len(M))]),
        "backward": mean([M[i][j] - M[j][j] for i, j in pairs]),
    }
