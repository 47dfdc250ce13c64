"""Batch normalisation: which layers depend on the batch that a sample stands in."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cl_bench.parallel.batch_norm import BatchNorm


def by_batch(network: nn.Module) -> list[str]:
    """Names of the layers that normalise by the batch in evaluation too: they keep no statistics.

    What such a network says of a sample depends on the samples beside it.
    """
    return [name for name, m in network.named_modules() if _is_by_batch(m)]


def _is_by_batch(module: nn.Module) -> bool:
    return isinstance(module, BatchNorm) and module.running_mean is None


@torch.no_grad()
def need_company(network: nn.Module, forward: Callable[[], object], samples: int) -> list[str]:
    """Names of the layers that cannot take the statistics of one sample: it is one value a channel.

    Args:
        network: in evaluation mode.
        forward: passes a batch.
        samples: in that batch.
    """
    names = {id(m): name for name, m in network.named_modules() if isinstance(m, BatchNorm)}
    found: list[str] = []

    def look(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        if given[0].numel() == given[0].shape[1] * samples:
            found.append(names[id(module)])

    layers = [m for m in network.modules() if id(m) in names]
    handles = [m.register_forward_pre_hook(look) for m in layers]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return found
