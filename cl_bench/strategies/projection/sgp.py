"""Scaled Gradient Projection (Saha & Roy, AAAI 2023).

GPM freezes every remembered direction alike. SGP gives each basis vector m_i an importance
lambda_i in (0, 1], from the singular values of the inputs it stands for, and takes only that much
of the gradient out: G <- G - G M diag(lambda) M^T. lambda = 1 is GPM, lambda = 0 fine-tuning.

The steps follow the authors' code (github.com/sahagobinda/SGP); we have not checked the paper's
equation numbers.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from cl_bench.contracts import State
from cl_bench.contracts.options import Inherited, Strength
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.subspace import Moments, Projection, grow


class SGP(GPM):
    """Projects updates out of the span of old inputs, each direction by its importance.

    Args:
        scale: alpha >= 0. Importance grows faster with the singular value for a larger alpha: 0
            makes it proportional, infinity GPM.
        shared: as in :class:`GPM`.

    Raises:
        UsageError: an option is out of range.
    """

    def __init__(self, *, scale: Strength = 10.0, **shared: Inherited) -> None:
        super().__init__(**shared)
        self.scale = scale
        self.importance: dict[str, Tensor] = {}

    def projection(self, name: str) -> Projection:
        """I - M diag(lambda) M^T."""
        return Projection(self.memory[name], self.importance[name])

    def remember(self, name: str, R: Moments, eps: float) -> None:
        """Grow the basis as GPM does, and accumulate importance."""
        M, S2 = grow(self.memory.get(name), R, eps, self.below(name))
        k = M.shape[1] - len(S2)
        # An old vector's surrogate singular value is the norm of its row of M^T R.
        s = torch.cat([R.energy_along(M[:, :k]), S2]).clamp_min(0).sqrt()
        v = importance_of(s, self.scale)
        old = self.importance.get(name, v[:0])
        self.importance[name] = torch.cat([(old.to(v) + v[:k]).clamp(max=1.0), v[k:]])
        self.memory[name] = M

    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """Rank, the share of input dimensions left free by importance, and its mean and minimum."""
        found = {}
        for name, M in self.memory.items():
            d, k = M.shape
            weights = self.importance[name]
            found[name] = {"rank": k, "capacity_left": 1 - float(weights.sum()) / d}
            if k:
                found[name] |= {
                    "importance_mean": float(weights.mean()),
                    "importance_min": float(weights.min()),
                }
        return found

    def state_dict(self) -> State:
        """GPM's, and the importances."""
        return {**super().state_dict(), "importance": dict(self.importance)}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.importance = dict(state["importance"])
        super().load_state_dict(state)


def importance_of(s: Tensor, alpha: float) -> Tensor:
    """(alpha + 1) s / (alpha s + max s): singular values (k,) to (0, 1], the largest to 1."""
    if not len(s) or float(s.max()) == 0.0:
        return torch.zeros_like(s)
    return ((alpha + 1) * s / (alpha * s + s.max())).clamp(max=1.0)
