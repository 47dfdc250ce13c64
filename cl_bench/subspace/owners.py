"""Whole matrices in the hands of one process each, where processes share weights out by rows.

What acts on all of a matrix, such as a decomposition or a left projection, then happens once, where
the matrix is whole. Rows travel to the owner and back again, those of many matrices at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from cl_bench.subspace.linear_maps import LinearMap
from cl_bench.subspace.rows import own_rows

TOGETHER = 1 << 22
"""Numbers of whole matrices that travel together (16 MiB in float32), but for a larger one."""


class Owned(dict[str, Any]):
    """Part of a state, by layer, of which every process holds the layers that it owns.

    Other parts of a state are the same everywhere.
    """


class Owners:
    """Who holds which matrix whole: one process each, or everybody where nobody shares weights out.

    Long work goes first, each to the process that has least to do, so that all have about as much.

    Args:
        layers: whose matrices; the same in every process, in the same order.
        apart: whether one process each is to hold them, where processes share weights out.

    Attributes:
        apart: whether one process each does.
        mine: the layers whose matrices this process holds whole.
    """

    def __init__(self, layers: Sequence[LinearMap] = (), apart: bool = True) -> None:
        self.layers = {layer.name: layer for layer in layers}
        weight = next((m.weight for m in layers if isinstance(m.weight, DTensor)), None)
        self.apart = apart and weight is not None
        self._of: dict[str, int] = {}
        self._group: Any = None
        self._size, self._rank = 1, 0
        if self.apart:
            assert isinstance(weight, DTensor)
            self._group = weight.device_mesh.get_group()
            self._size, self._rank = dist.get_world_size(self._group), dist.get_rank(self._group)
            self._of = shared_fairly(layers, self._size)
        self.mine = [m for m in layers if not self.apart or self._of[m.name] == self._rank]

    def weights(self) -> dict[str, Tensor]:
        """W (o, d) of every layer of :attr:`mine`, without bias: copies."""
        if not self.apart:
            return {m.name: m.whole().clone() for m in self.mine}
        return self.whole({m.name: self._rows(m, m.weight.detach()) for m in self.layers.values()})

    def gradients(self, layers: Sequence[LinearMap]) -> Iterator[tuple[str, Tensor]]:
        """Name and G (o, d) of those of :attr:`mine` that have one, a few at a time.

        The same ``layers`` in every process, which all must come to the end.
        """
        found = {m.name: self._rows(m, m.weight.grad) for m in layers if m.weight.grad is not None}
        for part in self._together(list(found)) if self.apart else ():
            yield from self._collected(part, found).items()
        if not self.apart:
            yield from found.items()

    def store(self, layers: Sequence[LinearMap], made: Callable[[str], Tensor]) -> None:
        """Write whole matrices, of which each owner makes its own, into the layers' weights."""
        if not self.apart:
            for layer in layers:
                layer.store(made(layer.name), layer.weight.detach(), None)
            return
        for part in self._together([layer.name for layer in layers]):
            for name, rows in self._spread(part, made).items():
                layer = self.layers[name]
                layer.store(rows, own_rows(layer.weight.detach()), None)

    def told(self, mine: Mapping[str, Any]) -> dict[str, Any]:
        """Plain values by layer, from all owners; in the order of the layers."""
        if not self.apart:
            return dict(mine)
        parts: list[Any] = [None] * self._size
        dist.all_gather_object(parts, dict(mine), group=self._group)
        joined = {name: value for part in parts for name, value in part.items()}
        return {name: joined[name] for name in self.layers if name in joined}

    def kept(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Of a state by layer, the layers of :attr:`mine`."""
        return {m.name: state[m.name] for m in self.mine if m.name in state}

    def whole(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole matrices (o, d) of :attr:`mine`, from the rows that every process has of each."""
        found: dict[str, Tensor] = {}
        for part in self._together(list(rows)):
            found |= self._collected(part, rows)
        return found

    def _rows(self, layer: LinearMap, tensor: Tensor) -> Tensor:
        return layer.matrix(own_rows(tensor), None)

    def _height(self, name: str, rank: int) -> int:
        """Rows of a matrix that a process has."""
        rows = self.layers[name].out_features
        each = -(-rows // self._size)
        return max(0, min(each, rows - rank * each))

    def _together(self, names: Sequence[str]) -> Iterator[list[str]]:
        """``names`` in parts of one dtype that travel together."""
        part: list[str] = []
        size = 0
        for name in names:
            weight = self.layers[name]
            numbers = weight.out_features * weight.in_features
            other = part and self.layers[part[0]].weight.dtype != weight.weight.dtype
            if part and (other or size + numbers > TOGETHER):
                yield part
                part, size = [], 0
            part.append(name)
            size += numbers
        if part:
            yield part

    def _collected(self, part: Sequence[str], rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        theirs = [[rows[n] for n in part if self._of[n] == q] for q in range(self._size)]
        mine = [name for name in part if self._of[name] == self._rank]
        widths = {name: self.layers[name].in_features for name in mine}
        got = [sum(self._height(n, p) * widths[n] for n in mine) for p in range(self._size)]
        buffer = self._exchanged(theirs, got, next(iter(rows.values())))
        pieces: dict[str, list[Tensor]] = {name: [] for name in mine}
        for p, piece in enumerate(torch.split(buffer, got)):
            sizes = [self._height(n, p) * widths[n] for n in mine]
            for name, flat in zip(mine, torch.split(piece, sizes) if mine else (), strict=True):
                pieces[name].append(flat.view(-1, widths[name]))
        return {name: torch.cat(parts) for name, parts in pieces.items()}

    def _exchanged(self, sent: Sequence[Sequence[Tensor]], got: list[int], like: Tensor) -> Tensor:
        """What comes from all processes, one behind the other, for what each is sent."""
        flat = torch.cat([t.reshape(-1) for of in sent for t in of] or [like.new_empty(0)])
        buffer = like.new_empty(sum(got))
        sizes = [sum(t.numel() for t in of) for of in sent]
        dist.all_to_all_single(buffer, flat, got, sizes, group=self._group)
        return buffer

    def _spread(self, part: Sequence[str], made: Callable[[str], Tensor]) -> dict[str, Tensor]:
        mine = [name for name in part if self._of[name] == self._rank]
        like = own_rows(self.layers[part[0]].weight.detach())
        heights = {n: [self._height(n, p) for p in range(self._size)] for n in part}
        cut = {n: torch.split(made(n).to(like.dtype), heights[n]) for n in mine}
        sent = [[cut[n][q] for n in mine] for q in range(self._size)]
        theirs = [[n for n in part if self._of[n] == p] for p in range(self._size)]
        sizes = [
            [heights[n][self._rank] * self.layers[n].in_features for n in names] for names in theirs
        ]
        got = [sum(of) for of in sizes]
        del cut
        buffer = self._exchanged(sent, got, like)
        del sent
        found: dict[str, Tensor] = {}
        for piece, names, own in zip(torch.split(buffer, got), theirs, sizes, strict=True):
            for name, flat in zip(names, torch.split(piece, own) if names else (), strict=True):
                found[name] = flat.view(-1, self.layers[name].in_features)
        return found


def shared_fairly(layers: Sequence[LinearMap], processes: int) -> dict[str, int]:
    """The process of every layer, by the work of its steps and of its decomposition."""
    work = {
        m.name: m.out_features * m.in_features * min(m.out_features, m.in_features) for m in layers
    }
    load, found = [0] * processes, {}
    for name in sorted(work, key=lambda name: (-work[name], name)):
        found[name] = min(range(processes), key=load.__getitem__)
        load[found[name]] += work[name]
    return found
