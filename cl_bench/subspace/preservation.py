"""How many singular directions of a layer to preserve.

The rules of adaptive SVD: the importance of a layer is the mean cosine between what enters it and
what leaves it; importances that average 1 over the layers turn into retention ratios, and those
into ranks.
"""

import math
from collections.abc import Mapping
from typing import Self

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

LEEWAY = 1e-9
"""A product such as 0.29 * 100 falls short of the whole number that is meant by less than this."""


class CosineSum:
    """Sum over input vectors x of cos(x, W x), both cut to their first r = min(n, m) coordinates.

    Cutting is arbitrary, but the only definition there is for matrices that are not square.

    Args:
        matrix: W (n, m).

    Attributes:
        total: sum of the cosines.
        rows: input vectors seen.
        samples: samples they came from.
    """

    def __init__(self, matrix: Tensor) -> None:
        self._rows_of_W: Tensor | None = matrix.detach()[: min(matrix.shape)]
        self.total = 0.0
        self.rows = 0
        self.samples = 0

    def add(self, x: Tensor, samples: int = 0) -> None:
        """Take in the rows of ``x`` (N, m)."""
        assert self._rows_of_W is not None, "a sum of sums takes no more inputs"
        x, W = x.float(), self._rows_of_W.float()
        cosines = F.cosine_similarity(x[:, : len(W)], x @ W.t(), dim=1)
        self.total += float(cosines.double().sum())
        self.rows += len(x)
        self.samples += samples

    def __add__(self, other: Self) -> Self:
        """Both sets of inputs together."""
        both = type(self).__new__(type(self))
        both._rows_of_W = None
        both.total = self.total + other.total
        both.rows = self.rows + other.rows
        both.samples = self.samples + other.samples
        return both

    @property
    def mean(self) -> float:
        """The importance I; NaN without inputs."""
        return self.total / self.rows if self.rows else math.nan


def retention_ratios(importance: Mapping[str, float], mrr: float, trr: float) -> dict[str, float]:
    """Ratios mrr + I_norm (trr - mrr), with I_norm = I / mean(I) clamped so that none exceeds 1.

    Args:
        importance: I by layer.
        mrr: ratio of a layer without importance.
        trr: ratio of a layer of average importance.

    Raises:
        ValueError: the mean is not positive, so that nothing can be divided by it.
    """
    mean = sum(importance.values()) / max(len(importance), 1)
    if not mean > 0.0:
        raise ValueError(f"the layers' importances have mean {mean:.4g}")
    most = (1.0 - mrr) / (trr - mrr) if trr > mrr else math.inf
    ratios = {}
    for name, value in importance.items():
        normalised = min(max(value / mean, 0.0), most)
        ratios[name] = min(mrr + normalised * (trr - mrr), 1.0)
    return ratios


def preserved_rank(ratio: float, r: int) -> int:
    """Directions to preserve, floor(ratio r), from 0 to r."""
    return min(max(math.floor(ratio * r + LEEWAY), 0), r)


def effective_rank(values: Tensor) -> int:
    """floor(exp(H)) with H the entropy of s / sum(s) (Roy & Vetterli); 0 for a matrix of zeros.

    Args:
        values: singular values s (r,).
    """
    if not len(values) or float(values.sum()) <= 0.0:
        return 0
    shares = values.double() / values.double().sum()
    shares = shares[shares > 0]
    return min(math.floor(math.exp(float(-(shares * shares.log()).sum())) + LEEWAY), len(values))


def snapped_rank(k: int, values: Tensor, window: float) -> int:
    """The rank near ``k`` with the largest relative gap (s_k - s_{k+1}) / s_k.

    Args:
        k: preserved directions; 0 and r stay as they are.
        values: singular values s (r,), descending.
        window: ranks up to this share of r away from ``k`` are looked at.
    """
    r = len(values)
    if not 0 < k < r:
        return k
    reach = math.floor(window * r + LEEWAY)
    first, last = max(k - reach, 1), min(k + reach, r - 1)
    above, below = values[first - 1 : last], values[first : last + 1]
    gaps = (above - below) / above.clamp_min(1e-300)
    return first + int(gaps.argmax())
