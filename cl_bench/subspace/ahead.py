"""Projecting inputs that are known before their step: several batches at once, once a task.

A network's first layer gets slices of tensors that were fetched for many steps, rows of data that
does not change during the task. W x = W P x + W (I - P) x, and while W changes inside P only, the
second term is a constant of each input. So the layer may as well learn from P x, which costs no
backward pass of its own, and P x does not change between epochs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cl_bench.subspace.projection import Projection

FETCHED_ELEMENTS = 1 << 22
"""Largest fetched tensor that is projected whole."""

DATA_ELEMENTS = 1 << 26
"""Largest data (256 MiB in float32) whose projection is kept for a task."""

CHUNK = 2048
"""Rows of the data projected at a time: what lies between stays in the processor's cache."""


def mark_drawn(rows: Tensor, data: Tensor, index: Tensor) -> None:
    """Say that ``rows`` is ``data[index]``, and that ``data`` will not change."""
    rows.drawn_from = Drawn(data, index, rows._version)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Drawn:
    """Which rows of which data a fetched tensor holds, and the version of it that did."""

    data: Tensor
    index: Tensor
    version: int

    def usable(self, fetched: Tensor, d: int) -> bool:
        """Whether it still holds them, as vectors of length ``d``, and the data fits."""
        return (
            fetched._version == self.version
            and self.data.is_contiguous()
            and self.data.numel() == len(self.data) * d
            and self.data.numel() <= DATA_ELEMENTS
        )


class InputsAhead:
    """P x and W (I - P) x for inputs that lie in a fetched tensor.

    Args:
        projection: P.

    Attributes:
        anchor: W as it was at the first input of the task, from which the constants are made; part
            of a strategy's state, since a W that has moved gives them with other rounding.
    """

    def __init__(self, projection: Projection) -> None:
        self.projection = projection
        self.anchor: Tensor | None = None
        self._fetched: Tensor | None = None
        self._version = self._offset = self._dim = self._width = -1
        self._projected = self._constant = torch.empty(0)
        self._batches: list[tuple[Tensor, Tensor]] = []
        self._data: Tensor | None = None
        self._projected_data = self._constant_data = torch.empty(0)

    def __deepcopy__(self, memo: dict[int, Any]) -> "InputsAhead":
        """A copy of the layer has weights of its own; the constants are not theirs."""
        return InputsAhead(self.projection)

    def of(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """P x (n, d) and W (I - P) x (n, o); None if ``x`` (n, d) is no part of fetched rows."""
        fetched = x._base
        if fetched is None or x.dim() != 2:
            return None
        n, d = x.shape
        if fetched is not self._fetched or fetched._version != self._version:
            if not self._worthwhile(x, fetched):
                return None
            if self.anchor is None:
                self.anchor = weight.detach().clone()
            self._fetched, self._version = fetched, fetched._version
            self._offset, self._dim, self._width = int(fetched.storage_offset()), d, n
            with torch.no_grad():
                self._projected, self._constant = self._prepare(fetched, d, self.anchor)
            # Views are cheaper made together than one a step.
            pieces = torch.split(self._projected, n), torch.split(self._constant, n)
            self._batches = list(zip(*pieces, strict=True))
        offset = x.storage_offset() - self._offset
        if offset % d or d != self._dim or not x.is_contiguous():
            return None
        start = offset // d
        if n == self._width and start % n == 0:
            return self._batches[start // n]
        return self._projected[start : start + n], self._constant[start : start + n]

    def _worthwhile(self, x: Tensor, fetched: Tensor) -> bool:
        return (
            (x.numel() < fetched.numel() or hasattr(fetched, "drawn_from"))
            and fetched.numel() <= FETCHED_ELEMENTS
            and fetched.numel() % x.shape[1] == 0
            and not fetched.requires_grad
            and x.dtype == fetched.dtype
            and fetched.is_contiguous()
        )

    def _prepare(self, fetched: Tensor, d: int, anchor: Tensor) -> tuple[Tensor, Tensor]:
        drawn: Drawn | None = getattr(fetched, "drawn_from", None)
        if drawn is None or not drawn.usable(fetched, d):
            rows = fetched.view(-1, d)
            found = torch.empty_like(rows), rows.new_empty(len(rows), anchor.shape[0])
            self.projection.to(rows).apart(rows, anchor.to(rows), *found)
            return found
        if drawn.data is not self._data:
            self._data = drawn.data
            rows = self._data.view(-1, d)
            self._projected_data = torch.empty_like(rows)
            self._constant_data = rows.new_empty(len(rows), anchor.shape[0])
            for start in range(0, len(rows), CHUNK):
                piece = slice(start, start + CHUNK)
                self.projection.to(rows).apart(
                    rows[piece],
                    anchor.to(rows),
                    self._projected_data[piece],
                    self._constant_data[piece],
                )
        return (
            self._projected_data.index_select(0, drawn.index),
            self._constant_data.index_select(0, drawn.index),
        )
