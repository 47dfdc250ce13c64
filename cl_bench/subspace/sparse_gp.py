"""A sparse Gaussian process in dual form, of which leverage scores are read.

The prior is GP(0, k), k(x, x') = exp(-|x - x'|^2 / (2 l^2)), at inducing points Z (m). Data enter
through one additive matrix L = sum_i beta_i k_Z(x_i) k_Z(x_i)^T, and the variance at x is

    v(x) = k(x, x) - k_xZ K^-1 k_Zx + k_xZ (K + L)^-1 k_Zx.

With all data as inducing points and beta = 1 / s^2, v beta is the diagonal of the hat matrix
K (K + s^2 I)^-1. As in the repository sequential-gp @ 27adda3, whose learner is not here.
"""

import torch
from torch import Tensor

JITTER = 1e-6
"""Added to K's diagonal."""


class SparseGP:
    """Leverage of features that come in batches, in double precision.

    Args:
        inducing: m, at most so many points: pivots of a Cholesky decomposition of K over the old
            ones and the batch.
        length: l; None takes the median distance of the first batch.

    Attributes:
        points: Z (m, d).
        dual: L (m, m).
    """

    def __init__(self, inducing: int, length: float | None = None) -> None:
        self.inducing, self.length = inducing, length
        self.points = self.dual = torch.zeros(0, 0, dtype=torch.float64)

    def learn(self, x: Tensor, beta: Tensor) -> None:
        """Samples (n, d) with their precisions (n,): Z is chosen anew, L carried over to it.

        With A = K_old^-1 K_(old, new), L <- A^T L A.
        """
        x, beta = x.double(), beta.double()
        if self.length is None:
            self.length = max(float(torch.pdist(x).median()), 1e-6) if len(x) > 1 else 1.0
        old = self.points
        both = torch.cat([old, x]) if len(old) else x
        new = both[pivots(self._kernel(both, both), self.inducing)]
        carried = torch.zeros(len(new), len(new), dtype=torch.float64)
        if len(old):
            A = torch.linalg.solve(self._gram(old), self._kernel(old, new))
            carried = A.t() @ self.dual @ A
        cross = self._kernel(new, x)
        self.points, self.dual = new, carried + (cross * beta) @ cross.t()

    def variance(self, x: Tensor) -> Tensor:
        """Posterior variance v (n,) at x (n, d)."""
        cross, K = self._kernel(self.points, x.double()), self._gram(self.points)
        prior = (cross * torch.linalg.solve(K, cross)).sum(0)
        known = (cross * torch.linalg.solve(K + self.dual, cross)).sum(0)
        left: Tensor = 1 - prior + known
        return left.clamp(min=0)

    def _kernel(self, a: Tensor, b: Tensor) -> Tensor:
        assert self.length is not None
        return torch.exp(-torch.cdist(a, b).square() / (2 * self.length**2))

    def _gram(self, z: Tensor) -> Tensor:
        return self._kernel(z, z) + JITTER * torch.eye(len(z), dtype=torch.float64)

    def state_dict(self) -> dict[str, Tensor | float | None]:
        """Points, L and l."""
        return {"points": self.points, "dual": self.dual, "length": self.length}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.points, self.dual = state["points"], state["dual"]
        self.length = state["length"]  # type: ignore[assignment]


def pivots(K: Tensor, most: int) -> Tensor:
    """Rows that a pivoted Cholesky decomposition of K (n, n) takes first, at most so many.

    Rows that those before explain to within the jitter are left out.
    """
    left, factor = K.diagonal().clone(), torch.zeros(0, len(K), dtype=K.dtype)
    found: list[int] = []
    for _ in range(min(most, len(K))):
        row = int(left.argmax())
        if float(left[row]) <= 10 * JITTER:
            break
        column = (K[row] - factor[:, row] @ factor) / left[row].sqrt()
        factor = torch.cat([factor, column[None]])
        left = left - column.square()
        left[row] = 0
        found.append(row)
    return torch.tensor(found)
