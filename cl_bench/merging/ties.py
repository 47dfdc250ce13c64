"""TIES: trim, elect signs, merge what agrees (Yadav et al., NeurIPS 2023)."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cl_bench.merging.rule import Deltas, Fold, Part, Rule, added, require


def smallest(chunks: Callable[[], Iterable[Tensor]], k: int) -> float:
    """The k-th smallest (from 1) of many numbers that are not negative, which come in chunks.

    Exact, and in constant memory: the bits of such numbers are ordered as they are, so sixteen bits
    after the other are counted. Chunks all have one type, float32 or float64.
    """
    before, rank, low = 0, k, None
    while low is None or low > 0:
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for chunk in (piece for c in chunks() for piece in torch.split(c.flatten(), 1 << 22)):
            width = 64 if chunk.dtype == torch.float64 else 32
            bits = chunk.view(torch.int64 if width == 64 else torch.int32).long()
            at = width - 16 if low is None else low - 16
            if low is not None:
                bits = bits[bits >> low == before]
            digits = (bits >> at) & 0xFFFF
            counts += torch.bincount(digits, minlength=1 << 16).cpu()
        reached = counts.cumsum(0)
        digit = int((reached >= rank).int().argmax())
        rank -= int(reached[digit] - counts[digit])
        before, low = before << 16 | digit, at
    kind = (torch.int64, torch.float64) if width == 64 else (torch.int32, torch.float32)
    return float(torch.tensor(before, dtype=kind[0]).view(kind[1]))


@dataclass(frozen=True)
class Ties(Rule):
    """Of every model the largest entries; of every entry, what has the sign of the sum.

    Folds exactly, in sums and counts of positive and of negative entries. The threshold is one of
    the whole model. Where positive and negative entries cancel to exactly zero, nothing is merged
    (the authors give such an entry the sign of the majority of all entries).

    Attributes:
        top: share of a model's entries that stays: those of at least the threshold's size.
        how: ``sum`` or ``mean`` of the entries that agree.
    """

    folds = True
    measures = True
    scale: float = 0.3
    top: float = 0.2
    how: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        require("top", self.top, "(0, 1]", 0 < self.top <= 1)

    def measure(self, deltas: Deltas) -> float:
        """The size that an entry needs to stay."""
        total = sum(delta.numel() for _, delta in deltas())
        k = max(total - int(total * self.top), 1)
        return smallest(lambda: (delta.abs() for _, delta in deltas()), k)

    def fold(self, fold: Fold, delta: Tensor, part: Part) -> Fold:
        """Sums and counts, by sign."""
        trimmed = torch.where(delta.abs() >= part.measure, delta, 0)
        return {
            "positive": added(fold, trimmed.clamp(min=0), "positive"),
            "negative": added(fold, trimmed.clamp(max=0), "negative"),
            "positive_count": added(fold, (trimmed > 0).int(), "positive_count"),
            "negative_count": added(fold, (trimmed < 0).int(), "negative_count"),
        }

    def merged(self, fold: Fold, part: Part) -> Tensor:
        """The entries of the elected sign."""
        positive, negative = fold["positive"], fold["negative"]
        if self.how == "mean":
            positive = positive / fold["positive_count"].clamp(min=1)
            negative = negative / fold["negative_count"].clamp(min=1)
        sign = (fold["positive"] + fold["negative"]).sign()
        return torch.where(sign > 0, positive, torch.where(sign < 0, negative, 0))
