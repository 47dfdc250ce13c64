"""Learning the batches of a pack, one optimizer step each."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cl_bench.contracts import Batch
from cl_bench.packed.stepping import short_backward, short_step


class ShortSteps:
    """Steps of one optimizer, many times in a row.

    Args:
        optimizer: as it is; who hooks into it later may be passed over.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.trained = [p for group in optimizer.param_groups for p in group["params"]]
        self._step = short_step(optimizer)
        self._whole: Tensor | None = None

    def take(self, loss: Tensor, constrain: Callable[[], None]) -> None:
        """One step down the gradient of ``loss`` (); ``constrain`` may change it before."""
        for parameter in self.trained:  # optimizer.zero_grad() takes as long as a small layer
            parameter.grad = None
        if self._whole is None:
            self._whole = torch.ones_like(loss)
        short_backward(loss, self._whole)
        constrain()
        self._step()


def learn_pack(
    pack: Batch,
    optimizer: Optimizer,
    schedulers: Sequence[LRScheduler],
    objective: Callable[[Batch], Tensor],
    constrain: Callable[[], None],
    learned: Callable[[Tensor], None],
) -> None:
    """One optimizer step for every batch of a pack.

    Args:
        pack: batches, stacked along the first dimension.
        optimizer: whose steps they are.
        schedulers: of its rate, those that follow steps.
        objective: a batch's loss.
        constrain: called when gradients are there.
        learned: told each loss when its step is over.
    """
    steps = ShortSteps(optimizer)
    for values in zip(*pack.values(), strict=True):
        loss = objective(dict(zip(pack, values, strict=True)))
        steps.take(loss, constrain)
        for scheduler in schedulers:
            scheduler.step()
        learned(loss)
