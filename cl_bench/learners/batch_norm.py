"""Batch normalisation: what depends on the batch, and batches of which processes hold parts.

``nn.SyncBatchNorm`` runs on GPUs alone, and would count the sample that a process learns nothing
from when a batch has fewer samples than there are processes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm

_shares: ContextVar[tuple[float, bool] | None] = ContextVar("shares", default=None)


def by_batch(network: nn.Module) -> list[str]:
    """Names of the layers that normalise by the batch in evaluation too: they keep no statistics.

    What such a network says of a sample depends on the samples beside it.
    """
    return [name for name, m in network.named_modules() if _is_by_batch(m)]


def _is_by_batch(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is None


@torch.no_grad()
def need_company(network: nn.Module, forward: Callable[[], object], samples: int) -> list[str]:
    """Names of the layers that cannot take the statistics of one sample: it is one value a channel.

    Args:
        network: in evaluation mode.
        forward: passes a batch.
        samples: in that batch.
    """
    names = {id(m): name for name, m in network.named_modules() if isinstance(m, _BatchNorm)}
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


@contextmanager
def part_of_a_batch(times: float, counts: bool) -> Iterator[None]:
    """Inside, what passes is this process's part of a batch; outside, batches of its own.

    Args:
        times: samples of the whole batch over those of the part.
        counts: whether the part counts at all.
    """
    token = _shares.set((times, counts))
    try:
        yield
    finally:
        _shares.reset(token)


def synchronise(network: nn.Module) -> None:
    """Have every batch normalisation layer take statistics over all processes' samples."""
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = SyncedBatchNorm


def _over_processes(part: Tensor) -> Tensor:
    total: Tensor = all_reduce(part)  # type: ignore[no-untyped-call]
    return total


class SyncedBatchNorm(_BatchNorm):
    """The layer's own behaviour, its training statistics those of the whole batch.

    An existing layer becomes one by a change of class. Gradients flow through the sums, so that the
    mean over processes of what each finds is the whole batch's gradient.
    """

    def forward(self, x: Tensor) -> Tensor:
        """As the layer that it was, of inputs (n, channels, ...)."""
        shares = _shares.get()
        if not self.training or shares is None:
            return super().forward(x)
        times, counts = shares
        others = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        live, count = float(counts), times * x.numel() / x.shape[1]
        if count <= 1:
            raise ValueError("batch normalisation needs more than one value per channel to train")
        mean = _over_processes(live * x.sum(others)) / count
        centred = x - mean.view(shape)
        var = _over_processes(live * centred.square().sum(others)) / count
        self._follow(mean.detach(), var.detach() * count / (count - 1))
        out: Tensor = centred * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out

    @torch.no_grad()
    def _follow(self, mean: Tensor, unbiased: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), share)
        self.running_var.lerp_(unbiased.to(self.running_var), share)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions: the layer that this was has been given its inputs before."""
