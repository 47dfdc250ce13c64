"""Batches that are as large as their tokens make them."""

import math

import torch
from torch import Tensor

from cl_bench.contracts import Data, UsageError
from cl_bench.learners import BaseLearner
from cl_bench.packed import Packs

GLANCE = 512
"""Samples whose tokens are counted at a time."""


def token_counts(learner: BaseLearner, data: Data, most: int, task: str) -> Tensor:
    """Tokens of every sample, int64 (n,).

    Args:
        learner: knows what of a batch is a token.
        data: is looked through once.
        most: tokens of a batch.
        task: whose data it is, for messages.

    Raises:
        UsageError: a batch might hold but one sample.
    """
    pieces = torch.split(torch.arange(len(data)), GLANCE)
    counts = torch.cat([learner.tokens(data[index]) for index in pieces])
    longest = int(counts.max())
    if most < 2 * longest:
        raise UsageError(
            f"batch_tokens={most}: task {task!r} has a sample of {longest} tokens; give at least "
            f"twice as many, batch_tokens={2 * longest}, or cut samples (stream.max_length=...)"
        )
    return counts


class TokenBatches(Packs):
    """As many batches in every epoch, whatever its order, none of more than ``most`` tokens.

    An epoch's samples are cut into pieces of about equally many tokens.

    Args:
        counts: tokens of every sample, int64 (n,).
        most: tokens of a batch; at least twice the longest sample.
    """

    def __init__(self, counts: Tensor, most: int) -> None:
        self._counts = counts
        # A piece reaches up to a sample over its share.
        steps = math.ceil(int(counts.sum()) / (most - int(counts.max()) + 1))
        super().__init__(len(counts), max(1, -(-len(counts) // steps)), 1, 1)
        self.steps = steps

    def bounds(self, order: Tensor | None = None) -> list[tuple[int, int]]:
        """Start and end of every batch; without an order, that of the data."""
        counts = self._counts if order is None else self._counts[order]
        before = counts.cumsum(0) - counts
        batch = before * self.steps // int(counts.sum())
        ends = torch.searchsorted(batch, torch.arange(self.steps), right=True).tolist()
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def batches_in(self, item: int) -> int:
        """One."""
        return 1
