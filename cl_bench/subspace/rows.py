"""Rows of matrices that processes share out (FSDP2): which are held here, and the whole of them."""

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
