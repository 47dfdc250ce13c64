"""Ridge regression that goes on: recursive least squares with forgetting, in double precision."""

import torch
from torch import Tensor


class RecursiveLeastSquares:
    """min over beta of sum_t lambda^(n-t) |y_t - z_t beta|^2 + rho lambda^n |beta|^2, row by row.

    Objectives weighted by theta^(2t) (Lite-RVFL) have the same beta for lambda = theta^-2, and
    overflow, while these weights stay at most 1. An effective memory is 1 / (1 - lambda) rows.

    Where inputs leave directions alone, forgetting takes the ridge away from those, and R grows
    there without bound. With ``leakage`` a row sqrt(d (1 - lambda) rho) e_i with target 0 comes
    along with every sample, i going round: on average the ridge stays rho.

    Args:
        width: d, of a row.
        outputs: c, of a target; more may come (:meth:`widen`).
        ridge: rho.
        forgetting: lambda, in (0, 1].
        leakage: keep the ridge.

    Attributes:
        R: (d, d), the inverse of the weighted Gram matrix and its ridge.
        beta: (d, c).
        seen: rows so far.
    """

    def __init__(
        self,
        width: int,
        outputs: int,
        ridge: float,
        forgetting: float = 1.0,
        leakage: bool = False,
    ) -> None:
        self.ridge, self.forgetting, self.leakage = ridge, forgetting, leakage
        self.R = torch.eye(width, dtype=torch.float64) / ridge
        self.beta = torch.zeros(width, outputs, dtype=torch.float64)
        self.seen = 0

    def widen(self, outputs: int) -> None:
        """Further outputs, whose targets were 0 so far."""
        more = outputs - self.beta.shape[1]
        if more > 0:
            self.beta = torch.nn.functional.pad(self.beta, (0, more))

    def learn(self, z: Tensor, y: Tensor) -> None:
        """Rows (n, d) with targets (n, c), the oldest first; as learning them one by one.

        With S = diag(lambda^1, ..., lambda^n) + Z R Z^T and G = R Z^T S^-1: beta += G (Y - Z beta),
        R <- (R - G Z R) / lambda^n.
        """
        z, y = z.double(), y.double()
        n, power = len(z), self.forgetting ** torch.arange(1, len(z) + 1).double()
        if self.leakage and self.forgetting < 1:
            z, y, power = self._leaking(z, y, power)
        RZ = self.R @ z.t()
        G = torch.linalg.solve(torch.diag(power) + z @ RZ, RZ.t()).t()
        self.beta = self.beta + G @ (y - z @ self.beta)
        R = (self.R - G @ RZ.t()) / self.forgetting**n
        self.R = (R + R.t()) / 2
        self.seen += n

    def _leaking(self, z: Tensor, y: Tensor, power: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, d = z.shape
        rows = torch.zeros_like(z)
        size = (d * (1 - self.forgetting) * self.ridge) ** 0.5
        rows[torch.arange(n), torch.arange(self.seen, self.seen + n) % d] = size
        return torch.cat([z, rows]), torch.cat([y, torch.zeros_like(y)]), power.repeat(2)

    def forget(self, z: Tensor, y: Tensor) -> None:
        """Take rows out again that were learned with weight 1: as if they had never come.

        R <- R + R Z^T (I - Z R Z^T)^-1 Z R, and beta follows.
        """
        z, y = z.double(), y.double()
        RZ = self.R @ z.t()
        G = torch.linalg.solve(torch.eye(len(z)).double() - z @ RZ, RZ.t()).t()
        self.beta = self.beta - G @ (y - z @ self.beta)
        R = self.R + G @ RZ.t()
        self.R = (R + R.t()) / 2
        self.seen -= len(z)

    def state_dict(self) -> dict[str, object]:
        """R, beta and how many rows made them."""
        return {"R": self.R, "beta": self.beta, "seen": self.seen}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Inverse of :meth:`state_dict`."""
        R, beta, seen = state["R"], state["beta"], state["seen"]
        assert isinstance(R, Tensor)
        assert isinstance(beta, Tensor)
        assert isinstance(seen, int)
        self.R, self.beta, self.seen = R, beta, seen
