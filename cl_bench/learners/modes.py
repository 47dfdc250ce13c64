"""The modes that a network is looked at in, each for a while and without a trace."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from cl_bench.contracts import UsageError
from cl_bench.subspace import is_adapted


@contextmanager
def same_modes(network: nn.Module) -> Iterator[None]:
    """Afterwards, every module is in the mode that it was in before."""
    # Module by module: somebody may keep a part of their network in evaluation mode.
    modes = [(module, module.training) for module in network.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def own_buffers(network: nn.Module) -> Iterator[None]:
    """Inside, the network writes into copies of its buffers: its statistics stay as they are.

    The buffers themselves are not touched, as a graph that is still to go backward may need them.
    """
    copies: dict[int, Tensor] = {}
    kept: list[tuple[nn.Module, str, Tensor]] = []
    for module in network.modules():
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            kept.append((module, name, buffer))
            setattr(module, name, copies.setdefault(id(buffer), buffer.clone()))
    try:
        yield
    finally:
        for module, name, buffer in kept:
            setattr(module, name, buffer)


@contextmanager
def without_adapters(network: nn.Module) -> Iterator[None]:
    """Inside, what PEFT put around layers adds nothing to them.

    Raises:
        UsageError: an adapter is merged into its layer, whose own weight is not there then.
    """
    # Not by PEFT's ``enable_adapters``: that changes what trains, too.
    adapted: list[Any] = [module for module in network.modules() if is_adapted(module)]
    if any(module.merged for module in adapted):
        raise UsageError(
            "an adapter is merged into its layer, so that the layer alone is not there to be "
            "asked: unmerge it before bare=True"
        )
    before = [module._disable_adapters for module in adapted]
    for module in adapted:
        module._disable_adapters = True
    try:
        yield
    finally:
        for module, disabled in zip(adapted, before, strict=True):
            module._disable_adapters = disabled


def reaching(layer: nn.Module, forward: Callable[[], object]) -> Tensor:
    """What ``forward`` hands to ``layer``, which then has nothing to compute.

    Args:
        layer: is called once.
        forward: runs the network.

    Returns:
        (..., d): the layer's input.
    """
    found: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        found.append(hidden)
        return hidden[..., :1]  # whatever comes behind the layer goes on, on almost nothing

    before = layer.__dict__.get("forward")
    layer.forward = keep
    try:
        forward()
    finally:
        if before is None:
            del layer.__dict__["forward"]
        else:
            layer.forward = before
    return found[0]
