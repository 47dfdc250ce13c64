"""The one form in which losses are averaged: a sum, and over how many terms it goes."""

from dataclasses import dataclass

import torch
from torch import Tensor

Count = int | float | Tensor
"""A number of terms, or the sum of their weights; a tensor () where it is counted on a device, so
that nobody waits for it."""


@dataclass(frozen=True)
class Loss:
    """A loss over some data. Sums and counts add up; means over unequal batches do not.

    Attributes:
        sum: of the terms, ().
        count: of the terms: samples, labelled tokens, or the sum of their weights.
    """

    sum: Tensor
    count: Count

    def __add__(self, other: "Loss") -> "Loss":
        return Loss(self.sum + other.sum, self.count + other.count)

    @property
    def mean(self) -> Tensor:
        """Over the terms; 0 where there are none."""
        return self.sum / some(self.count)


def some(count: Count) -> Count:
    """The count as something to divide by: 1 where there is nothing to count."""
    if isinstance(count, Tensor):
        return torch.where(count > 0, count, torch.ones_like(count))
    return count if count > 0 else 1
