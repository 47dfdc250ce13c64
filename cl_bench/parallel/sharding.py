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
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from cl_bench.contracts import UsageError
from cl_bench.parallel.ranks import decided, gathered, on_cpu, rank, world
from cl_bench.parallel.sending import from_owners
from cl_bench.parallel.stored import Stored, read, resolved
from cl_bench.subspace import Owned, is_experts, is_transposed, linear_maps, shared_out

OWNED = "owned"
"""Of a group of an optimizer's: names of its parameters, which this process alone holds."""


def shard(
    network: nn.Module,
    blocks: Sequence[nn.Module],
    calls: Sequence[str] = (),
    computed_in: torch.dtype | None = None,
    cut_again: bool = False,
) -> None:
    """Leave in every process its part of the network's parameters.

    Args:
        network: what is called as a whole.
        blocks: parts of it that are called; each is put together when it is, and not longer.
        calls: methods of the network that it is called by, beside ``forward``.
        computed_in: half precision that weights are put together in. What processes hold stays as
            it is: gradients are added up, and steps taken, in full precision.
        cut_again: whether between the forward and the backward pass processes hold but rows of what
            lies in no block, too, which else stays together: then all parameters are such as steps
            are taken of.

    Raises:
        UsageError: a weight cannot be cut into equal parts.
    """
    if world() == 1:
        raise UsageError("one process has nobody to share weights out with: start several")
    kind = "cuda" if dist.get_backend() == "nccl" else "cpu"
    processes = init_device_mesh(kind, (dist.get_world_size(),))
    by_column: dict[Any, int] = {}  # where the rows of W lie in what holds it
    for name, module in network.named_modules():
        if is_experts(module):
            by_column |= _of_experts(name, module, processes.size())
        elif is_transposed(module):
            weight: Any = module.weight
            if weight.shape[1] % processes.size():
                raise UsageError(
                    f"layer {name!r} has {weight.shape[1]} output features, which "
                    f"{processes.size()} processes cannot share equally: use another number of "
                    "trainer.devices"
                )
            by_column[weight] = 1
        if getattr(module, "groups", 1) != 1:
            raise UsageError(
                f"layer {name!r} is a grouped convolution, whose weight cannot be shared out group "
                "by group: use trainer=ddp"
            )

    def placement(parameter: nn.Parameter) -> Shard | None:
        return Shard(by_column[parameter]) if parameter in by_column else None

    policy = MixedPrecisionPolicy()
    if computed_in is not None:
        policy = MixedPrecisionPolicy(param_dtype=computed_in, reduce_dtype=torch.float32)
    how: dict[str, Any] = {"mesh": processes, "shard_placement_fn": placement, "mp_policy": policy}
    parts = [b for b in blocks if not isinstance(b, nn.ModuleList | nn.ModuleDict)]  # never called
    for block in parts:
        fully_shard(block, **how)
    fully_shard(network, reshard_after_forward=cut_again, **how)
    _follow(network, parts, kind == "cuda")
    for name in calls:
        register_fsdp_forward_method(network, name)


def _follow(network: nn.Module, parts: Sequence[nn.Module], ahead: bool) -> None:
    """Say which part the backward pass puts together while another is at work, if ``ahead``.

    FSDP2 would take it from the last passes, of which processes may have made unlike ones. Without
    a device that works beside the CPU there is nothing to win, and a part more to hold.
    """
    order: list[Any] = [*parts, network]
    for part, before in zip(order, [order[0], *order], strict=False):
        part.set_modules_to_backward_prefetch([before if ahead else part])


def _of_experts(name: str, module: nn.Module, processes: int) -> dict[Any, int]:
    """Along which dimension experts' weights and biases are shared out: that of W's rows."""
    found: dict[Any, int] = {}
    for layer in linear_maps(name, module):
        if layer.out_features % processes:
            raise UsageError(
                f"the experts {layer.name.partition('#')[0]!r} have {layer.out_features} output "
                f"features, which {processes} processes cannot share equally: use another number "
                "of trainer.devices"
            )
        found[layer.weight] = 2 if layer.transposed else 1
        if layer.bias is not None:
            found[layer.bias] = 1
    return found


def is_sharded(network: nn.Module) -> bool:
    """Whether processes share out the network's weights."""
    return isinstance(network, FSDPModule)


def mesh(network: nn.Module) -> DeviceMesh | None:
    """Of the processes that share a network's weights out; None where nobody does."""
    return next((p.device_mesh for p in network.parameters() if isinstance(p, DTensor)), None)


def is_part(tensor: Tensor) -> bool:
    """Whether this process holds only its part of a tensor."""
    return isinstance(tensor, DTensor)


def agree(network: nn.Module) -> None:
    """What every process holds all of is process 0's, drawn at random though it may be."""
    for tensor in (*network.parameters(), *network.buffers()):
        if not is_part(tensor):
            dist.broadcast(tensor.detach(), 0)


@contextmanager
def put_together(network: nn.Module, cut_again: bool = False) -> Iterator[None]:
    """Inside, every process holds all weights, to read and not to write; calls need no other.

    All processes must enter and leave together. ``cut_again`` as :func:`shard` was told.
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
            part.set_reshard_after_forward(cut_again or part is not network, recurse=False)
            part.set_reshard_after_backward(True, recurse=False)
            part.reshard()


def whole(value: Any) -> Any:
    """A nested value with every tensor whole; all processes must ask for it."""
    if isinstance(value, DTensor):
        return value.full_tensor().detach()
    if isinstance(value, Owned):
        return Owned((k, whole(v)) for k, v in value.items())
    if isinstance(value, Mapping):
        return {k: whole(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(whole, value))
    return value


def to_first(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors, whole in process 0, on its CPU; elsewhere those that are shared out are empty.

    One tensor at a time is whole elsewhere. All processes must ask.
    """

    def first(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        found = tensor.full_tensor().detach()
        return found.cpu() if rank() == 0 else found.new_empty(0, device="cpu")

    return {name: first(tensor) for name, tensor in tensors.items()}


def collected(value: Any) -> Any:
    """A nested value with what any process owns, in process 0; what is shared out stays so."""
    if isinstance(value, Owned):
        return from_owners(dict(value))
    if isinstance(value, Mapping):
        return {k: collected(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(collected, value))
    return value


def agreed(value: Any) -> Any:
    """A nested value as process 0 has it, but for what each process owns or has rows of."""
    found: list[Any] = [on_cpu(_without_own(value)) if world() > 1 else value]
    if world() > 1:
        dist.broadcast_object_list(found, src=0)
    return _with_own(found[0], value)


def _without_own(value: Any) -> Any:
    if isinstance(value, Owned):
        return {}
    if isinstance(value, Mapping):
        return {k: _without_own(v) for k, v in value.items()}
    return None if isinstance(value, DTensor) else value


def _with_own(common: Any, own: Any) -> Any:
    if isinstance(own, Owned | DTensor):
        return own
    if isinstance(own, Mapping):
        return {k: _with_own(v, own.get(k)) for k, v in common.items()}
    return common


@torch.no_grad()
def filled(network: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    """Give a network that is shared out its numbers, if process 0 alone has them.

    Args:
        network: on the meta device in the other processes; it lies on their own afterwards.
        weights: of process 0, whole; elsewhere of the same shapes.

    Returns:
        Whether that was so.
    """
    if not any(gathered(any(p.is_meta for p in network.parameters()))):
        return False
    if next(network.parameters()).is_meta:
        cuda = dist.get_backend() == "nccl"
        network.to_empty(
            device=torch.device("cuda", torch.cuda.current_device()) if cuda else "cpu"
        )
    for name, own in network.named_parameters():
        value = weights[name]  # one at a time, and no more than a place for it beside process 0
        own.copy_(
            shared_out(torch.empty_like(value, device="cpu") if value.is_meta else value, own)
        )
    told = decided(lambda: dict(network.named_buffers()))
    for name, buffer in network.named_buffers():
        buffer.copy_(told[name])
    return True


@torch.no_grad()
def load_weights(network: nn.Module, weights: Mapping[str, Any]) -> None:
    """Write weights and buffers into a network whose parameters are shared out.

    Args:
        network: whose.
        weights: wholes, own rows, or where they are stored.
    """
    own = network.state_dict()
    stored = [name for name, value in weights.items() if isinstance(value, Stored)]
    read((weights[name], own[name]) for name in stored)
    cut = {name: p if name in stored else shared_out(weights[name], p) for name, p in own.items()}
    network.load_state_dict({**weights, **cut})


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """``optimizer.state_dict()``; in process 0, what any process owns stands there by name.

    All processes must ask.
    """
    state = optimizer.state_dict()
    owned, held = Owned(), False
    for group in state["param_groups"]:
        if OWNED in group:
            held = True
            for name, index in zip(group[OWNED], group["params"], strict=True):
                if index in state["state"]:
                    owned[name] = state["state"].pop(index)
            group["params"], group[OWNED] = [], []
    return {**state, OWNED: collected(owned)} if held else state


def load_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Inverse of :func:`optimizer_state`, in as many processes as there are now."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = resolved(state, next((p.device_mesh for p in parameters if is_part(p)), None))
    cut: dict[int, Any] = {
        index: {
            key: shared_out(v, parameters[index])
            if isinstance(v, Tensor) and v.shape == parameters[index].shape
            else v
            for key, v in parts.items()
        }
        for index, parts in state["state"].items()
    }
    now = optimizer.state_dict()["param_groups"]
    groups = []
    for old, new in zip(state["param_groups"], now, strict=True):
        groups.append({**old, OWNED: new[OWNED], "params": new["params"]} if OWNED in new else old)
        if OWNED in new:
            saved = state[OWNED]
            named = zip(new[OWNED], new["params"], strict=True)
            cut |= {index: saved[name] for name, index in named if name in saved}
    optimizer.load_state_dict({"state": cut, "param_groups": groups})
