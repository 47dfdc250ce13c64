"""Batch normalisation of batches of which processes hold parts.

``nn.SyncBatchNorm`` runs on GPUs alone, and would count the sample that a process learns nothing
from when a batch has fewer samples than there are processes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm

BatchNorm = _BatchNorm
"""What all of torch's batch normalisation layers are, whatever the dimensions of their inputs."""

_shares: ContextVar[tuple[float, bool] | None] = ContextVar("shares", default=None)


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
        if isinstance(module, BatchNorm):
            module.__class__ = SyncedBatchNorm


def _over_processes(part: Tensor) -> Tensor:
    total: Tensor = all_reduce(part)  # type: ignore[no-untyped-call]
    return total


class SyncedBatchNorm(BatchNorm):
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
