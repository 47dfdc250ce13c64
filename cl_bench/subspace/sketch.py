"""Statistics of a layer's new inputs that add up over clients: a random sketch, or the Gram.

With U the old basis, A (d x n) the inputs and R = A - U U^T A their new part, a client gives
Y = R Omega (d x w) for its own random Omega (n x w), or G = R R^T. Sums over clients are those of
the pooled inputs: sum_k R_k Omega_k = [R_1 .. R_K] [Omega_1; ..; Omega_K]. Neither A nor Omega is
ever whole in memory: both are made a piece at a time.
"""

from typing import Literal

import torch
from torch import Generator, Tensor

SketchKind = Literal["gaussian", "uniform", "gram"]

RESOLUTION = 1e-6
"""Singular values below this share of the largest energy are rounding, not directions."""


class ResidualSketch:
    """Accumulates the statistic of one layer.

    Args:
        dim: d.
        basis: U (d, k), orthonormal; None is the empty basis.
        kind: ``gaussian`` and ``uniform`` on (-1, 1) say how Omega is drawn; ``gram`` needs none.
        width: w, columns of Omega.
        generator: draws Omega.

    Attributes:
        samples: samples whose inputs were taken in.
        energy: ||A||_F^2.
        residual: ||R||_F^2.
    """

    def __init__(
        self,
        dim: int,
        basis: Tensor | None,
        kind: SketchKind,
        width: int = 0,
        generator: Generator | None = None,
    ) -> None:
        self.dim = dim
        self.kind = kind
        self.width = width
        self.samples = 0
        self.energy = 0.0
        self.residual = 0.0
        self._basis = None if basis is None or basis.shape[1] == 0 else basis
        self._generator = generator
        self._sum: Tensor | None = None

    def add(self, x: Tensor, samples: int = 0) -> None:
        """Take in the rows of ``x`` (n, d), which came from ``samples`` samples."""
        x = x if x.dtype in (torch.float32, torch.float64) else x.float()
        self.samples += samples
        self.energy += float(x.double().square().sum())
        if self._basis is not None:
            self._basis = self._basis.to(x)
            x = x - (x @ self._basis) @ self._basis.t()
        self.residual += float(x.double().square().sum())
        new = (x.t() @ x).double() if self.kind == "gram" else x.t() @ self._draw(len(x)).to(x)
        self._sum = new if self._sum is None else self._sum.add_(new)

    def _draw(self, rows: int) -> Tensor:
        shape = (rows, self.width)
        if self.kind == "gaussian":
            return torch.randn(shape, generator=self._generator)
        return torch.rand(shape, generator=self._generator).mul_(2).sub_(1)

    @property
    def statistic(self) -> Tensor:
        """Y (d, w); or the lower triangle of G, (d (d + 1) / 2,), float64."""
        if self.kind != "gram":
            empty = torch.zeros(self.dim, self.width)
            return empty if self._sum is None else self._sum
        rows, columns = torch.tril_indices(self.dim, self.dim)
        if self._sum is None:
            return torch.zeros(len(rows), dtype=torch.float64)
        return self._sum[rows, columns]


def leading_inputs(statistic: Tensor, dim: int, kind: SketchKind) -> tuple[Tensor, Tensor]:
    """Energies and directions of the pooled new inputs, from the summed statistic alone.

    Args:
        statistic: sum of :attr:`ResidualSketch.statistic` over clients.
        dim: d.
        kind: as the clients had it.

    Returns:
        ``(S2, U)``: energies (r,), descending, up to a common factor for a random sketch; and
        directions (d, r), orthonormal, float64. Directions of rounding error are left out.
    """
    if kind == "gram":
        rows, columns = torch.tril_indices(dim, dim)
        gram = torch.zeros(dim, dim, dtype=torch.float64, device=statistic.device)
        gram[rows, columns] = gram[columns, rows] = statistic.double()
        energies, directions = torch.linalg.eigh(gram)
        energies, directions = energies.flip(0), directions.flip(1)
        floor = torch.finfo(torch.float32).eps
    else:
        directions, values, _ = torch.linalg.svd(statistic.double(), full_matrices=False)
        energies = values.square()
        floor = RESOLUTION**2
    kept = energies > floor * energies.clamp_min(0).sum()
    return energies[kept], directions[:, kept]
