"""What each process has of its own, brought to process 0."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cl_bench.parallel.ranks import gathered, rank


@dataclass(frozen=True)
class _Sent:
    """Stands for a tensor that travels by itself."""

    shape: torch.Size
    dtype: torch.dtype


def from_owners(value: Mapping[str, Any]) -> dict[str, Any]:
    """In process 0, all that any process has; a tensor at a time is on its way."""
    mine: list[Tensor] = []

    def outlined(own: Tensor) -> _Sent:
        mine.append(own)
        return _Sent(own.shape, own.dtype)

    outlines = gathered(_replaced(value, Tensor, outlined))
    found: dict[str, Any] = {}
    for source, outline in enumerate(outlines):
        if rank() == source != 0:
            for own in mine:
                dist.send(own.to(_where()).contiguous(), 0)
        if rank() == 0:
            found |= _replaced(outline, _Sent, partial(_received, source, iter(mine)))
    return found


def _received(source: int, mine: Iterator[Tensor], sent: _Sent) -> Tensor:
    if source == 0:
        return next(mine).cpu()
    place = torch.empty(sent.shape, dtype=sent.dtype, device=_where())
    dist.recv(place, source)
    return place.cpu()


def _where() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def _replaced(value: Any, kind: type, make: Callable[[Any], Any]) -> Any:
    if isinstance(value, kind):
        return make(value)
    if isinstance(value, Mapping):
        return {k: _replaced(v, kind, make) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_replaced(v, kind, make) for v in value)
    return value
