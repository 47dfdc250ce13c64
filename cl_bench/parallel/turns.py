"""Calls of a network that processes share out, of which each process makes as many as it likes.

A part of such a network is put together by all processes at once, so all would have to make the
same calls. In evaluation they do not: data may not divide, and answers are generated where they are
needed, as long as they get.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from cl_bench.parallel.sharding import is_part, is_sharded

_open: WeakSet[nn.Module] = WeakSet()


@contextmanager
def in_turns(network: nn.Module, cut_again: bool = False) -> Iterator[None]:
    """Inside, a process may call the network when and as often as it likes, without gradients.

    What lies outside of its blocks is whole meanwhile. A block is put together when a process comes
    to it, and not longer; processes that are elsewhere, or done, take part in that and throw it
    away. The block that comes first in the network goes first, so that calls soon run side by side.
    All processes must enter and leave together. ``cut_again`` as :func:`shard` was told.
    """
    whole = not is_sharded(network) or not any(map(is_part, network.parameters()))
    if whole or network in _open:
        yield
        return
    root: Any = network
    parts = [m for m in network.modules() if isinstance(m, FSDPModule) and m is not root]

    def come(number: int, *_: Any) -> None:
        while (first := _least(number, root)) != number:
            parts[first].unshard()
            parts[first].reshard()
        if number < len(parts):
            parts[number].unshard()

    _open.add(network)
    root.set_reshard_after_forward(False, recurse=False)
    root.unshard()
    handles = [
        part.register_forward_pre_hook(partial(come, i), prepend=True)
        for i, part in enumerate(parts)
    ]
    try:
        yield
    finally:
        come(len(parts))
        for handle in handles:
            handle.remove()
        root.set_reshard_after_forward(cut_again, recurse=False)
        root.reshard()
        _open.discard(network)


def _least(number: int, network: nn.Module) -> int:
    """Of what all processes give."""
    where = next(network.parameters()).device
    found = torch.tensor(number, device=where)
    dist.all_reduce(found, dist.ReduceOp.MIN)
    return int(found)
