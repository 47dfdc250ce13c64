"""A mixture of Gaussians that learns samples one by one, kept as precision matrices."""

from typing import Literal

import torch
from torch import Tensor

Rule = Literal["exact", "published"]
"""Of the covariance: that of all samples by their weights, or FIGMN's recursion."""


class Mixture:
    """K Gaussians over D dimensions, in double precision.

    A sample x moves component j by its posterior p_j: s += p, w = p / s, e = x - mu, mu += w e, and

        C <- (1 - w) (C + w e e^T),

    which is the covariance of all samples by their weights, and positive definite whatever comes.
    In terms of L = C^-1 that is one rank-one step: with u = L e / (1 - w) and c = w (1 - w),
    L <- L / (1 - w) - c u u^T / (1 + c e^T u).

    FIGMN's published recursion, (1 - w) C + w e' e'^T - w^2 e e^T with e' = x - mu after its step,
    has w (1 - 3 w + w^2) in place of w (1 - w) before e e^T: negative for w > (3 - sqrt 5) / 2, so
    that a far sample makes C indefinite.

    Args:
        width: D.
        rule: of the covariance.

    Attributes:
        mean: (K, D).
        precision: L (K, D, D).
        logdet: log det C (K,).
        mass: s (K,), posteriors added up.
        age: samples since each was made (K,).
    """

    NAMES = ("mean", "precision", "logdet", "mass", "age")

    def __init__(self, width: int, rule: Rule = "exact") -> None:
        self.rule = rule
        self.mean = torch.zeros(0, width, dtype=torch.float64)
        self.precision = torch.zeros(0, width, width, dtype=torch.float64)
        self.logdet, self.mass, self.age = torch.zeros(3, 0, dtype=torch.float64).unbind()

    def __len__(self) -> int:
        return len(self.mean)

    def distances(self, x: Tensor) -> Tensor:
        """Squared Mahalanobis distances of x (D,) to every mean (K,)."""
        e = x - self.mean
        return torch.einsum("ki,kij,kj->k", e, self.precision, e)

    def create(self, x: Tensor, variance: Tensor) -> None:
        """A component at x (D,) with a diagonal covariance (D,)."""
        one = torch.ones(1, dtype=torch.float64)
        self.mean = torch.cat([self.mean, x[None]])
        self.precision = torch.cat([self.precision, torch.diag(1 / variance)[None]])
        self.logdet = torch.cat([self.logdet, variance.log().sum()[None]])
        self.mass, self.age = torch.cat([self.mass, one]), torch.cat([self.age, one])

    def learn(self, x: Tensor) -> None:
        """Move every component towards x (D,) by its posterior."""
        posterior = (-(self.distances(x) + self.logdet) / 2 + self.mass.log()).softmax(0)
        self.age = self.age + 1
        self.mass = self.mass + posterior
        w, e = posterior / self.mass, x - self.mean
        self.mean = self.mean + w[:, None] * e
        factor = w * (1 - w) if self.rule == "exact" else w * (1 - 3 * w + w * w)
        u = torch.einsum("kij,kj->ki", self.precision, e) / (1 - w)[:, None]
        grown = 1 + factor * (e * u).sum(1)
        outer = u[:, :, None] * u[:, None]
        scale = (factor / grown)[:, None, None]
        self.precision = self.precision / (1 - w)[:, None, None] - scale * outer
        self.logdet = self.logdet + self.mean.shape[1] * (1 - w).log() + grown.log()

    def keep(self, which: Tensor) -> None:
        """Drop the components outside of ``which``, bool (K,)."""
        for name in self.NAMES:
            setattr(self, name, getattr(self, name)[which])

    def widen(self, variance: Tensor) -> None:
        """Further dimensions, in which every sample was 0, of these variances (m,)."""
        (k, d), m = self.mean.shape, len(variance)
        self.mean = torch.nn.functional.pad(self.mean, (0, m))
        wide = torch.zeros(k, d + m, d + m, dtype=torch.float64)
        wide[:, :d, :d] = self.precision
        wide[:, range(d, d + m), range(d, d + m)] = 1 / variance
        self.precision, self.logdet = wide, self.logdet + variance.log().sum()

    def regress(self, a: Tensor, priors: bool = True) -> Tensor:
        """Expected last D - d dimensions (n, D - d) where the first d are a (n, d).

        A component's is mu_b - L_bb^-1 L_ba (a - mu_a); they mix by the posterior of a alone, whose
        precision is L_aa - L_ab L_bb^-1 L_ba and whose covariance has det C det L_bb.

        Args:
            a: what is known.
            priors: weigh components by their mass, too.
        """
        d = a.shape[1]
        L_aa, L_ab, L_bb = (
            self.precision[:, :d, :d],
            self.precision[:, :d, d:],
            self.precision[:, d:, d:],
        )
        solved = torch.linalg.solve(L_bb, L_ab.transpose(1, 2))
        e = a[None] - self.mean[:, None, :d]
        expected = self.mean[:, None, d:] - e @ solved.transpose(1, 2)
        q = ((e @ (L_aa - L_ab @ solved)) * e).sum(2)
        score = -(q + (self.logdet + torch.linalg.slogdet(L_bb)[1])[:, None]) / 2
        if priors:
            score = score + self.mass.log()[:, None]
        mixed: Tensor = (score.softmax(0)[:, :, None] * expected).sum(0)
        return mixed

    def state_dict(self) -> dict[str, Tensor]:
        """All that the attributes hold."""
        return {name: getattr(self, name) for name in self.NAMES}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of :meth:`state_dict`."""
        for name in self.NAMES:
            setattr(self, name, state[name])
