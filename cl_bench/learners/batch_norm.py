"""Batch normalisation over a batch of which every process holds a part.

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

from cl_bench.learners.ranks import world

_counts: ContextVar[bool] = ContextVar("counts", default=True)


@contextmanager
def counting(samples: bool) -> Iterator[None]:
    """Inside, what this process sends through a network counts in a batch's statistics, or not."""
    token = _counts.set(samples)
    try:
        yield
    finally:
        _counts.reset(token)


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
        if not self.training or world() == 1:
            return super().forward(x)
        others = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        live = float(_counts.get())
        mine = x.new_tensor([live * x.numel() / x.shape[1]])
        sums = _over_processes(torch.cat([live * x.sum(others), mine]))
        count = sums[-1].detach()
        if count <= 1:
            raise ValueError("batch normalisation needs more than one value per channel to train")
        mean = sums[:-1] / count
        centred = x - mean.view(shape)
        var = _over_processes(live * centred.square().sum(others)) / count
        self._follow(mean.detach(), var.detach() * count / (count - 1).clamp_min(1))
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
