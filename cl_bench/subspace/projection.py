"""Taking the old subspace out of a matrix: A <- A - (A M) M^T, at the least cost."""

import torch
from torch import Tensor

from cl_bench.subspace.basis import complement

ROUNDING = float(torch.finfo(torch.float32).eps)
"""Share of its trace below which an eigenvalue of second moments holds only rounding."""


class Projection:
    """Right multiplication by I - M M^T, or by I - M diag(importance) M^T, times ``scale``.

    The d x d projector is never built. With k <= d/2 directions A - (A M) M^T is cheaper, with
    more (A N) N^T, N spanning the complement; both cost 4 n d min(k, d - k) operations.

    Args:
        basis: M (d, k), orthonormal columns.
        importance: (k,) in [0, 1], how much of each direction is taken out (SGP); None means all.
        scale: a factor on what is left (Adam-NSCL divides by the projector's norm).

    Attributes:
        exact: whether it is a projection, so that applying it twice changes nothing.
        trivial: whether it changes nothing at all.
    """

    def __init__(self, basis: Tensor, importance: Tensor | None = None, scale: float = 1.0) -> None:
        self.dim, self.rank = basis.shape
        self.scale = scale
        self.exact = importance is None and scale == 1.0
        self.trivial = self.rank == 0 and scale == 1.0
        self._free = importance is None and 2 * self.rank > self.dim
        kept = complement(basis.double()) if self._free else basis.double()
        self._right = kept.t().contiguous()
        self._left = kept if importance is None else kept * importance.to(kept)
        if self._free:
            self._left = self._left * scale

    @property
    def cost(self) -> int:
        """Multiplications per row."""
        return 2 * self._left.numel()

    def to(self, like: Tensor) -> "Projection":
        """The projection itself, in the dtype and on the device of ``like``."""
        if self._left.dtype != like.dtype or self._left.device != like.device:
            self._left, self._right = self._left.to(like), self._right.to(like)
        return self

    def __call__(self, rows: Tensor) -> Tensor:
        """``rows`` (n, d) without their part in span(M)."""
        if self._free:
            return (rows @ self._left) @ self._right
        return torch.addmm(rows, rows @ self._left, self._right, beta=self.scale, alpha=-self.scale)

    def inplace(self, rows: Tensor) -> Tensor:
        """The projected rows, written into ``rows``."""
        if self._free:
            return torch.mm(rows @ self._left, self._right, out=rows)
        return rows.addmm_(rows @ self._left, self._right, beta=self.scale, alpha=-self.scale)

    def apart(self, rows: Tensor, W: Tensor, inside: Tensor, outside: Tensor) -> None:
        """P x into ``inside`` and W (I - P) x into ``outside``, for the rows x of a matrix.

        Args:
            rows: (n, d).
            W: (o, d).
            inside: (n, d), written.
            outside: (n, o), written; right where the projection is ``exact``.
        """
        coefficients, image = rows @ self._left, W @ self._left
        if self._free:
            torch.mm(coefficients, self._right, out=inside)
            torch.mm(rows, W.t(), out=outside).addmm_(coefficients, image.t(), alpha=-1)
        else:
            torch.addmm(rows, coefficients, self._right, alpha=-1, out=inside)
            torch.mm(coefficients, image.t(), out=outside)


def inverse_projection(A: Tensor, alpha: float) -> Projection:
    """Right multiplication by P = (A / alpha + I)^-1 = alpha (alpha I + A)^-1.

    Directions that A has much more of than alpha are taken out, others stay: with A = V L V^T it
    is I - V diag(L / (L + alpha)) V^T. As alpha goes to 0 it projects off the span of A.

    Args:
        A: (d, d), symmetric, no negative eigenvalues but for rounding.
        alpha: above 0, in the unit of A.
    """
    values, vectors = torch.linalg.eigh(A.double())
    seen = values > ROUNDING * values.clamp_min(0).sum()
    values, vectors = values[seen], vectors[:, seen]
    return Projection(vectors, values / (values + alpha))
