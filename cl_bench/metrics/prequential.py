"""Accuracy of what is tested before it learns, sample by sample, and what drift does to it."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

NEAR = 0.02
"""A window is back after a drift when it is this close to what it was before."""


def windowed(bits: Tensor, window: int) -> Tensor:
    """Mean of the last ``window`` of ``bits`` (n,) at every sample; of fewer at the beginning."""
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), bits.double().cumsum(0)])
    end = torch.arange(1, len(bits) + 1)
    start = (end - window).clamp(min=0)
    return (sums[end] - sums[start]) / (end - start)


def kappa(accuracy: float, chance: float) -> float:
    """(p - p_0) / (1 - p_0); NaN where the other one is never wrong."""
    return (accuracy - chance) / (1 - chance) if chance < 1 else math.nan


def recoveries(bits: Tensor, drifts: Sequence[int], window: int) -> list[float]:
    """Samples after each drift until the window is back near what it was just before.

    Only windows that lie wholly behind the drift count. NaN where none is, before the next drift or
    the end, and for a drift before which a window was not yet full.

    Args:
        bits: (n,), 1 where the answer was right.
        drifts: positions, rising.
        window: samples of a window.
    """
    curve, found = windowed(bits, window), []
    for start, stop in zip(drifts, [*drifts[1:], len(bits)], strict=True):
        later = curve[start + window - 1 : stop]
        known = start >= window and len(later)
        back = (later >= curve[start - 1] - NEAR).nonzero() if known else later[:0]
        found.append(float(back[0]) + window if len(back) else math.nan)
    return found


class Prequential:
    """Keeps a bit for every sample that was answered.

    Args:
        window: samples of the windowed accuracy.
        fading: f of the faded one, S <- right + f S over N <- 1 + f N.

    Attributes:
        drifts: positions at which something is known to have changed.
    """

    def __init__(self, window: int = 100, fading: float = 0.999) -> None:
        self.window, self.fading = window, fading
        self.drifts: list[int] = []
        self._bits = bytearray()
        self._unchanged = 0  # how often the label is the one before
        self._last = -1
        self._faded = self._weight = 0.0

    def __len__(self) -> int:
        return len(self._bits)

    @property
    def bits(self) -> Tensor:
        """uint8 (n,), 1 where the answer was right."""
        return torch.frombuffer(bytearray(self._bits) or bytearray(1), dtype=torch.uint8)[
            : len(self._bits)
        ]

    def mark(self) -> None:
        """Something changes here."""
        self.drifts.append(len(self))

    def add(self, right: Tensor, labels: Tensor) -> None:
        """Answers to some samples (n,): whether each was right, and what would have been."""
        for hit, label in zip(right.tolist(), labels.tolist(), strict=True):
            self._bits.append(hit > 0.5)
            self._unchanged += label == self._last
            self._last = label
            self._faded = (hit > 0.5) + self.fading * self._faded
            self._weight = 1 + self.fading * self._weight

    def values(self) -> dict[str, float]:
        """``accuracy``, ``window``, ``faded``, and ``kappa`` against repeating the last label."""
        n = len(self._bits)
        if not n:
            return dict.fromkeys(("accuracy", "window", "faded", "kappa"), math.nan)
        accuracy, last = sum(self._bits) / n, self._bits[-self.window :]
        return {
            "accuracy": accuracy,
            "window": sum(last) / len(last),
            "faded": self._faded / self._weight,
            "kappa": kappa(accuracy, self._unchanged / n),
        }

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return {
            "bits": self.bits.clone(),
            "drifts": list(self.drifts),
            "unchanged": self._unchanged,
            "last": self._last,
            "faded": self._faded,
            "weight": self._weight,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self._bits = bytearray(state["bits"].tolist())
        self.drifts = list(state["drifts"])
        self._unchanged, self._last = state["unchanged"], state["last"]
        self._faded, self._weight = state["faded"], state["weight"]
