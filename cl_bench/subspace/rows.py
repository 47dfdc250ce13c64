"""Rows of matrices that processes share out (FSDP2): which are held here, and the whole of them."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


def own_rows(tensor: Tensor) -> Tensor:
    """What this process holds of a weight or gradient, to write into.

    All of it, but where processes share weights out (FSDP2): then its rows of the matrix.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def cut_rows(matrix: Tensor, like: Tensor) -> Tensor:
    """Of a whole matrix (o, q) of which all processes have one, the rows that this one holds.

    Where they share out the weight ``like``; else all rows. The matrix is process 0's.
    """
    if not isinstance(like, DTensor):
        return matrix
    return distribute_tensor(matrix.contiguous(), like.device_mesh, [Shard(0)]).to_local()


def join_rows(rows: Tensor, like: Tensor, total: int) -> Tensor:
    """Inverse of :func:`cut_rows`: the whole matrix (``total``, q)."""
    if not isinstance(like, DTensor):
        return rows
    q = rows.shape[1]
    return DTensor.from_local(
        rows, like.device_mesh, [Shard(0)], shape=torch.Size((total, q)), stride=(q, 1)
    ).full_tensor()


def shared_out(value: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor, of which all processes have one, the part that this one holds of ``like``.

    Cut as ``like`` is; all of it where ``like`` is whole. The value is process 0's.
    """
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    value = value.to(like.device, like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements)


def summed(part: Tensor, like: Tensor) -> Tensor:
    """The sum over the processes that share out the weight ``like``, in place."""
    if isinstance(like, DTensor):
        dist.all_reduce(part, group=like.device_mesh.get_group())
    return part


def rows_of(whole: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor that this process has made itself, the part that it holds of ``like``."""
    if not isinstance(like, DTensor):
        return whole
    (placement,) = like.placements
    assert isinstance(placement, Shard)
    count, me = like.device_mesh.size(), like.device_mesh.get_local_rank()
    length = whole.shape[placement.dim]
    each = -(-length // count)
    start = min(me * each, length)
    return whole.narrow(placement.dim, start, min(each, length - start))


def as_rows(rows: Tensor, like: Tensor) -> Tensor:
    """Own rows as part of a tensor that is shared out as ``like`` is."""
    if not isinstance(like, DTensor):
        return rows
    return DTensor.from_local(
        rows, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )


def joined(tensor: Tensor) -> Tensor:
    """A tensor, whole where processes share it out; all of them must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def added_up(parts: Sequence[Tensor], like: Sequence[Tensor]) -> Tensor:
    """The sum of numbers (), each of the rows of a weight, over the processes that share these.

    Its gradient reaches every process's own rows.
    """
    total = torch.stack(list(parts)).sum()
    apart = [part.detach() for part, of in zip(parts, like, strict=True) if isinstance(of, DTensor)]
    if not apart:
        return total
    own = torch.stack(apart).sum()
    weight = next(of for of in like if isinstance(of, DTensor))
    return total + (summed(own.clone(), weight) - own)
