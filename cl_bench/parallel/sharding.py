"""Weights that processes share out among themselves (FSDP2), every layer by its output features.

A row of W belongs to one process, so right multiplications of W, its gradient or its step, which is
all that projections out of old inputs are, need nothing of the others.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from cl_bench.contracts import UsageError
from cl_bench.parallel.ranks import world
from cl_bench.subspace import is_transposed, shared_out


def shard(network: nn.Module, blocks: Sequence[nn.Module], calls: Sequence[str] = ()) -> None:
    """Leave in every process its part of the network's parameters.

    Args:
        network: what is called as a whole.
        blocks: parts of it that are called; each is put together when it is, and not longer.
        calls: methods of the network that it is called by, beside ``forward``.

    Raises:
        UsageError: a weight cannot be cut into equal parts.
    """
    if world() == 1:
        raise UsageError("one process has nobody to share weights out with: start several")
    kind = "cuda" if dist.get_backend() == "nccl" else "cpu"
    mesh = init_device_mesh(kind, (dist.get_world_size(),))
    by_column = set()
    for name, module in network.named_modules():
        if is_transposed(module):
            weight: Any = module.weight
            if weight.shape[1] % mesh.size():
                raise UsageError(
                    f"layer {name!r} has {weight.shape[1]} output features, which {mesh.size()} "
                    "processes cannot share equally: use another number of trainer.devices"
                )
            by_column.add(weight)
        if getattr(module, "groups", 1) != 1:
            raise UsageError(
                f"layer {name!r} is a grouped convolution, whose weight cannot be shared out group "
                "by group: use trainer=ddp"
            )

    def placement(parameter: nn.Parameter) -> Shard | None:
        return Shard(1) if parameter in by_column else None

    for block in blocks:
        if not isinstance(block, nn.ModuleList | nn.ModuleDict):  # those are never called
            fully_shard(block, mesh=mesh, shard_placement_fn=placement)
    fully_shard(network, mesh=mesh, shard_placement_fn=placement, reshard_after_forward=False)
    for name in calls:
        register_fsdp_forward_method(network, name)


def is_sharded(network: nn.Module) -> bool:
    """Whether processes share out the network's weights."""
    return isinstance(network, FSDPModule)


def is_part(tensor: Tensor) -> bool:
    """Whether this process holds only its part of a tensor."""
    return isinstance(tensor, DTensor)


def agree(network: nn.Module) -> None:
    """What every process holds all of is process 0's, drawn at random though it may be."""
    for tensor in (*network.parameters(), *network.buffers()):
        if not is_part(tensor):
            dist.broadcast(tensor.detach(), 0)


@contextmanager
def put_together(network: nn.Module) -> Iterator[None]:
    """Inside, every process holds all weights, to read and not to write; calls need no other.

    All processes must enter and leave together.
    """
    if not is_sharded(network) or not any(map(is_part, network.parameters())):
        yield
        return
    parts = [m for m in network.modules() if isinstance(m, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.set_reshard_after_backward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not network, recurse=False)
            part.set_reshard_after_backward(True, recurse=False)
            part.reshard()


def whole(value: Any) -> Any:
    """A nested value with every tensor whole; all processes must ask for it."""
    if isinstance(value, DTensor):
        return value.full_tensor().detach()
    if isinstance(value, Mapping):
        return {k: whole(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(whole, value))
    return value


@torch.no_grad()
def load_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Write whole weights and buffers into a network whose parameters are shared out."""
    cut = {name: shared_out(weights[name], p) for name, p in network.state_dict().items()}
    network.load_state_dict({**weights, **cut})


def load_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """``optimizer.load_state_dict`` of a state whose tensors are whole."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    cut = {
        index: {
            key: shared_out(v, parameters[index])
            if isinstance(v, Tensor) and v.shape == parameters[index].shape
            else v
            for key, v in parts.items()
        }
        for index, parts in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": cut})
