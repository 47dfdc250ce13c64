"""Batches whose gradients are accumulated into one step, weighed by what they hold."""

import torch
from torch import Tensor
from torch.optim import Optimizer

from cl_bench.contracts.loss import Count, some


class Window:
    """The batches behind one optimizer step under gradient accumulation.

    The step's loss is the mean over all of the window's terms. Lightning takes the mean over
    ``accumulate_grad_batches`` batches, which is another one where batches differ in size, and too
    small where an epoch ends inside a window. How many terms a window has is known when it ends:
    until then batch i counts n_i / n_1, then every gradient is rescaled once, after they are
    synchronised and unscaled and before anybody reads, projects or clips them.
    """

    def __init__(self) -> None:
        self._first: Count = 0
        self._total: Count = 0
        self._batches = 0

    def weigh(self, loss: Tensor, count: Count) -> Tensor:
        """The mean loss of a batch of ``count`` terms, weighed against the window's first."""
        if isinstance(count, Tensor) and loss.dtype == torch.float64:
            count = count.double()  # whole numbers would be divided in single precision
        self._batches += 1
        self._total = self._total + count
        if self._batches == 1:
            self._first = some(count)
            return loss if isinstance(count, Tensor) or count else loss * 0
        alike = isinstance(count, int) and count == self._first
        return loss if alike else loss * (count / self._first)

    def settle(self, optimizer: Optimizer, divisor: int) -> None:
        """Rescale the gradients to the mean over the window, and begin another.

        Args:
            optimizer: of the gradients.
            divisor: what every batch's loss was divided by.
        """
        factor = divisor * self._first / some(self._total)
        self._first, self._total, self._batches = 0, 0, 0
        if isinstance(factor, float) and factor == 1.0:
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad *= factor
