"""Splitting weight matrices by their singular values: W = U_h S_h V_h^T + U_l S_l V_l^T.

No singular value decomposition is computed. The eigenvectors of the smaller Gram matrix, in
float64, are the singular vectors of the short side, its eigenvalues the squared singular values;
the long side's vectors follow from W by one orthogonalisation. That costs what an SVD in float32
does, gives projectors that agree with one in float64, and goes in batches over equal shapes.

Real weights have no gap where they are split, so the bases are not unique: compare projectors, and
what they do to W, never bases.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

BATCH_ELEMENTS = 1 << 25
"""Gram matrices are decomposed together up to this many elements (256 MiB in float64)."""


@dataclass(frozen=True)
class Split:
    """The k leading singular triplets of a matrix W (n, m), and what is left of it; r = min(n, m).

    Attributes:
        values: s (r,), all singular values, descending, float64.
        U_h: (n, k), left singular vectors of the k largest.
        V_h: (m, k), right ones.
        U_l: (n, r - k), the other left ones; None where n > m and nobody asked for them. They span
            the complement of U_h where n <= m.
        V_l: (m, r - k), likewise; the complement of V_h where m <= n.
    """

    values: Tensor
    U_h: Tensor
    V_h: Tensor
    U_l: Tensor | None
    V_l: Tensor | None

    @property
    def k(self) -> int:
        """Triplets that are preserved."""
        return self.U_h.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(n, m)."""
        return len(self.U_h), len(self.V_h)

    def to(self, device: torch.device) -> "Split":
        """A copy of the split on ``device``."""
        low = [None if x is None else x.to(device) for x in (self.U_l, self.V_l)]
        return Split(self.values.to(device), self.U_h.to(device), self.V_h.to(device), *low)

    def low_over_kept(self, W: Tensor) -> float:
        """||W V_l|| / s_k, with spectral norm: above 1, what was kept no longer leads in W.

        Args:
            W: (n, m), what became of the matrix; on its shorter side the kept vectors still are
                singular vectors of it.
        """
        n, m = self.shape
        tall, rest = (W, self.V_l) if n >= m else (W.t(), self.U_l)
        assert rest is not None
        return largest_value(tall.to(rest) @ rest) / float(self.values[self.k - 1])


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a matrix W (n, m), and the singular vectors of its short side.

    Attributes:
        matrix: W.
        values: s (r,), descending, float64.
        vectors: (r, r), right singular vectors where n >= m, else left ones; float64.
    """

    matrix: Tensor
    values: Tensor
    vectors: Tensor

    def split(self, k: int, low: bool = False) -> Split:
        """The k leading triplets apart from the rest, as float32, or float64 if W is.

        Args:
            k: from 0 to r.
            low: whether the r - k other vectors of the long side are wanted too.
        """
        n, m = self.matrix.shape
        short = self.vectors
        # The long side of a square matrix is short as well: its complement comes with it.
        columns = len(self.values) if low or n == m else k
        tall = self.matrix.double() if n >= m else self.matrix.double().t()
        # Images of vectors that W maps to nothing are rounding: any length does, if not infinite.
        images = tall @ short[:, :columns]
        images = images / torch.linalg.vector_norm(images, dim=0).clamp_min(1e-150)
        long, triangle = torch.linalg.qr(images)
        long = long * _signs(triangle.diagonal())
        dtype = torch.promote_types(self.matrix.dtype, torch.float32)
        parts = [x.to(dtype).contiguous() for x in (short[:, :k], short[:, k:], long[:, :k])]
        rest = long[:, k:].to(dtype).contiguous() if columns > k or columns == len(short) else None
        short_h, short_l, long_h = parts
        if n >= m:
            return Split(self.values, long_h, short_h, rest, short_l)
        return Split(self.values, short_h, long_h, short_l, rest)


def spectra(matrices: Sequence[Tensor], alike: bool = True) -> Iterator[tuple[int, Spectrum]]:
    """Singular values and short-side vectors of matrices, equal shapes together.

    Args:
        matrices: two-dimensional, of any floating dtype.
        alike: whether all processes of a group give the same ones. They are all given the first's:
            two devices may compute different vectors for values that are nearly equal.

    Yields:
        ``(index into matrices, spectrum)``, every index once; in the order of shapes.
    """
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for i, matrix in enumerate(matrices):
        by_shape.setdefault(tuple(matrix.shape), []).append(i)
    for (n, m), members in by_shape.items():
        at_once = max(1, BATCH_ELEMENTS // min(n, m) ** 2)
        for start in range(0, len(members), at_once):
            part = members[start : start + at_once]
            gram = torch.stack([_gram(matrices[i]) for i in part])
            energies, vectors = torch.linalg.eigh(gram)
            several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
            if alike and several:
                energies, vectors = energies.contiguous(), vectors.contiguous()
                dist.broadcast(energies, 0)
                dist.broadcast(vectors, 0)
            values = energies.clamp_min(0.0).sqrt().flip(1)
            for j, i in enumerate(part):
                yield i, Spectrum(matrices[i], values[j], vectors[j].flip(1))


def largest_value(matrix: Tensor) -> float:
    """The largest singular value of ``matrix`` (n, m), through its float64 Gram; 0 if empty."""
    if matrix.numel() == 0:
        return 0.0
    return float(torch.linalg.eigvalsh(_gram(matrix))[-1].clamp_min(0.0).sqrt())


def _gram(matrix: Tensor) -> Tensor:
    wide = matrix.double()
    wide = wide.t() if len(wide) >= wide.shape[1] else wide
    return wide @ wide.t()


def _signs(values: Tensor) -> Tensor:
    return torch.where(values < 0, -1.0, 1.0).to(values)
