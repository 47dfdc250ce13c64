"""Bottlenecks beside MLPs (AdaptFormer: Chen et al., NeurIPS 2022).

A block's MLP, whose result is added to the hidden states h, is given a companion that reads the
same h:  h + MLP(h) + s U relu(D h + b) + s c, with D (r, d) and U (d, r).
"""

import math
from collections.abc import Callable, Sequence

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cl_bench.blocks.block import Block


class Bottleneck(nn.Module):
    """s (U relu(D h + b) + c), at first zero: U, b and c are.

    Args:
        width: d.
        r: of the bottleneck.
        scale: s.
        dropout: share of the bottleneck that training leaves out.
    """

    def __init__(self, width: int, r: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, r), nn.Linear(r, width)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.up.weight, self.up.bias, self.down.bias):
            nn.init.zeros_(zero)
        self.scale, self.dropout = scale, dropout

    def forward(self, hidden: Tensor) -> Tensor:
        """Of hidden states (n, L, d)."""
        inside = F.dropout(self.down(hidden).relu(), self.dropout, self.training)
        out: Tensor = self.up(inside) * self.scale
        return out


class Bottlenecks:
    """One beside the MLP of every block, from now on until :meth:`remove`.

    Args:
        blocks: of the network.
        shown: gives what acts now, one for every block; None leaves the blocks as they are.
    """

    def __init__(
        self, blocks: Sequence[Block], shown: Callable[[], Sequence[nn.Module] | None]
    ) -> None:
        self.shown = shown
        self._read: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        for i, block in enumerate(blocks):
            self._handles += [
                block.reads.register_forward_pre_hook(self._note(i)),
                block.writes.register_forward_hook(self._add(i)),
            ]

    def _note(self, i: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            if self.shown() is not None:
                self._read[i] = given[0]

        return note

    def _add(self, i: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        def add(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
            acting = self.shown()
            if acting is None:
                return None
            more: Tensor = acting[i](self._read.pop(i))
            return out + more

        return add

    def remove(self) -> None:
        """The blocks are alone again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
