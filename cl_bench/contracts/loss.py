"""The one form in which losses are averaged: a sum, and over how many terms it goes."""

from dataclasses import dataclass

from torch import Tensor

Count = int | Tensor
"""A number of terms; a tensor () where it is counted on a device, so that nobody waits for it."""


@dataclass(frozen=True)
class Loss:
    """A loss over some data. Sums and counts add up; means over unequal batches do not.

    Attributes:
        sum: of the terms, ().
        count: of the terms: samples, or labelled tokens.
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
    """The count as something to divide by: at least 1."""
    return count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1)
