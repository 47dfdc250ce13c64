"""Projecting inputs that are known before their step: several batches at once, once a task.

A network's first layer gets slices of tensors that were fetched for many steps, rows of data that
stays the same for the whole task. W x = W P x + W (I - P) x, and while W changes inside P only, the
second term is a constant of each input. So the layer may as well learn from P x, which costs no
backward pass of its own, and P x is the same in every epoch.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from cl_bench.subspace.projection import Projection

FETCHED_ELEMENTS = 1 << 22
"""Largest fetched tensor that is projected whole."""

DATA_ELEMENTS = 1 << 26
"""Largest data (256 MiB in float32) whose projection is kept for a task."""


def mark_drawn(rows: Tensor, data: Tensor, index: Tensor) -> None:
    """Say that ``rows`` is ``data[index]``, and that ``data`` will not change."""
    rows.drawn_from = (data, index)  # type: ignore[attr-defined]


class InputsAhead:
    """P x and W (I - P) x for inputs that lie in a fetched tensor.

    The constant is made anew for each fetched tensor, from the weights as they then are: a run that
    is resumed between two of them goes on bit for bit.

    Args:
        projection: P.
    """

    def __init__(self, projection: Projection) -> None:
        self.projection = projection
        self._fetched: Tensor | None = None
        self._version = -1
        self._projected = self._constant = torch.empty(0)
        self._data: Tensor | None = None
        self._projected_data = torch.empty(0)

    def __deepcopy__(self, memo: dict[int, Any]) -> "InputsAhead":
        """A copy of the layer has weights of its own; the constants are not theirs."""
        return InputsAhead(self.projection)

    def of(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """P x (n, d) and W (I - P) x (n, o); None if ``x`` (n, d) is not rows of a fetched tensor."""
        fetched = x._base
        if fetched is None or x.dim() != 2:
            return None
        n, d = x.shape
        if fetched is not self._fetched or fetched._version != self._version:
            if not self._worthwhile(x, fetched):
                return None
            self._fetched, self._version = fetched, fetched._version
            with torch.no_grad():
                rows = fetched.view(-1, d)
                self._projected = self._project(fetched, rows)
                self._constant = F.linear(rows - self._projected, weight)
        offset = x.storage_offset() - fetched.storage_offset()
        if offset % d or d != self._projected.shape[1] or not x.is_contiguous():
            return None
        start = offset // d
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

    def _project(self, fetched: Tensor, rows: Tensor) -> Tensor:
        data, index = getattr(fetched, "drawn_from", (None, None))
        if data is None or data.numel() > DATA_ELEMENTS or data.numel() != len(data) * rows.shape[1]:
            return self.projection.to(rows)(rows)
        if data is not self._data:
            self._data = data
            self._projected_data = self.projection.to(rows)(data.view(-1, rows.shape[1]))
        return self._projected_data.index_select(0, index)
