"""Biographies as pre-training text: shuffled every epoch, put end to end, cut into equal pieces."""

import math
from collections.abc import Iterator
from typing import Annotated

import torch
from torch import Tensor

from cl_bench.contracts.checking import checked
from cl_bench.contracts.language import IGNORE
from cl_bench.contracts.options import Count, Range
from cl_bench.contracts.randomness import generator
from cl_bench.contracts.stream import Batch
from cl_bench.tasks.arguments import require
from cl_bench.tasks.biography.vocabulary import END, HOLE, PAD
from cl_bench.tasks.biography.world import World

CHUNK = 4096
"""Biographies that are written at a time."""


@checked("stream.pretrain.")
class Biographies:
    """Batches of packed biographies of the people 0 to ``count`` - 1.

    Args:
        world: the people.
        count: how many of them are written about.
        variants: fixed biographies of each person, all read in every epoch, with different
            sentences and orders; None writes one biography of each anew for every epoch.
        length: tokens of a piece.
        batch_size: pieces of a batch.

    Raises:
        UsageError: an argument is out of range.
    """

    def __init__(
        self,
        world: World,
        count: int,
        variants: int | None,
        length: Annotated[int, Range(least=2)],
        batch_size: Count,
    ) -> None:
        orders = math.factorial(len(world.attributes))
        most = min(orders, len(world.sentences[0]))
        if variants is not None:
            remedy = (
                f"between 1 and {most}: so many biographies of one person can differ in all "
                "sentences and in their order"
            )
            require(1 <= variants <= most, "variants", variants, remedy)
        self.world = world
        self.count = count
        self.variants = variants
        self.length = length
        self.batch_size = batch_size
        self._fixed = None if variants is None else self._written(variants, "fixed")

    def documents(self, epoch: int) -> tuple[Tensor, Tensor]:
        """All biographies of an epoch: their tokens end to end (int32), and their lengths."""
        return self._fixed or self._written(1, f"epoch {epoch}")

    def _written(self, variants: int, key: str) -> tuple[Tensor, Tensor]:
        templates, orders = self.world.choices(self.count, variants, key)
        people = torch.arange(self.count).repeat_interleave(variants)
        tokens, lengths = [], []
        for start in range(0, len(people), CHUNK):
            rows = slice(start, start + CHUNK)
            text = self.world.biographies(
                people[rows], templates.flatten(0, 1)[rows], orders.flatten(0, 1)[rows]
            )
            stands = text != HOLE
            tokens.append(text[stands].int())
            lengths.append(stands.sum(1))
        return torch.cat(tokens), torch.cat(lengths)

    def pieces(self, epoch: int, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels of an epoch, int32 and int64 (n, length).

        What follows the end of a document is a new name, which nothing predicts: it is not learned.
        """
        tokens, lengths = self.documents(epoch)
        order = torch.randperm(len(lengths), generator=generator(seed, "biographies", epoch))
        starts, sizes = (lengths.cumsum(0) - lengths)[order], lengths[order]
        offsets = starts - (sizes.cumsum(0) - sizes)
        text = tokens[offsets.repeat_interleave(sizes) + torch.arange(len(tokens))]
        labels = text.long()
        labels[1:][text[:-1] == END] = IGNORE
        missing = -len(text) % self.length
        text = torch.nn.functional.pad(text, (0, missing), value=PAD)
        labels = torch.nn.functional.pad(labels, (0, missing), value=IGNORE)
        return text.view(-1, self.length), labels.view(-1, self.length)

    def batches(self, seed: int) -> Iterator[Batch]:
        """Language batches without end, epoch after epoch; the last of an epoch may be smaller."""
        epoch = 0
        while True:
            inputs, labels = self.pieces(epoch, seed)
            for start in range(0, len(inputs), self.batch_size):
                rows = slice(start, start + self.batch_size)
                yield {
                    "input_ids": inputs[rows].long(),
                    "labels": labels[rows],
                    "attention_mask": (inputs[rows] != PAD).long(),
                }
            epoch += 1
