"""The processes that train one model together, and what they tell each other.

Without ``torch.distributed`` there is one process, of rank 0, and nothing is sent anywhere.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from cl_bench.contracts import Batch

T = TypeVar("T")


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is; 0 writes files and speaks to people."""
    return dist.get_rank() if world() > 1 else 0


def on_cpu(value: Any) -> Any:
    """A nested value with every tensor on the CPU, where any process can unpack it."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, Mapping):
        return {k: on_cpu(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(on_cpu, value))
    return value


def gathered(value: T) -> list[T]:
    """The value of every process, by rank; of several processes, with tensors on the CPU."""
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, on_cpu(value))
    return found


def decided(make: Callable[[], T]) -> T:
    """What process 0 makes, in every process; of several, with tensors on the CPU."""
    if world() == 1:
        return make()
    found: list[Any] = [on_cpu(make()) if rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]  # type: ignore[no-any-return]


def average_(tensor: Tensor) -> Tensor:
    """The mean over processes, written into ``tensor``."""
    if world() > 1:
        dist.all_reduce(tensor)
        tensor /= world()
    return tensor


def share(batch: Batch) -> Batch:
    """The samples of this process, of a batch that all hold: consecutive ones, none twice.

    A process for which nothing is left gets the first sample, of which its loss counts nothing.
    """
    if world() == 1:
        return batch
    n = len(next(iter(batch.values())))
    start, stop = n * rank() // world(), n * (rank() + 1) // world()
    if start == stop:
        start, stop = 0, 1
    return {name: values[start:stop] for name, values in batch.items()}


def is_idle(batch: Batch) -> bool:
    """Whether nothing of a batch is left for this process."""
    n = len(next(iter(batch.values())))
    return n * rank() // world() == n * (rank() + 1) // world()
