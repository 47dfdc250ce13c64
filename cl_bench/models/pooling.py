"""One vector a sample from one a position."""

from typing import Literal

import torch
from torch import Tensor, nn

Pooling = Literal["cls", "mean", "last"]
"""The first position's vector, the mean over positions that hold something, or the last of them."""


def pooled(hidden: Tensor, held: Tensor, pooling: Pooling) -> Tensor:
    """(n, d) of ``hidden`` (n, L, d).

    Args:
        hidden: one vector a position.
        held: bool (n, L), which positions hold something; a row of none counts as all.
        pooling: how.
    """
    if pooling == "cls":
        return hidden[:, 0]
    held = held | ~held.any(1, keepdim=True)
    if pooling == "last":
        places = torch.arange(held.shape[1], device=held.device)
        last = torch.where(held, places, -1).amax(1)
        return hidden[torch.arange(len(hidden), device=held.device), last]
    weights = held.to(hidden.dtype)[..., None]
    return (hidden * weights).sum(1) / weights.sum(1)


class Pool(nn.Module):
    """:func:`pooled` in one way, where others can see what it is given."""

    pools = True

    def __init__(self, pooling: Pooling) -> None:
        super().__init__()
        self.pooling = pooling

    def forward(self, hidden: Tensor, held: Tensor) -> Tensor:
        """(n, d) of ``hidden`` (n, L, d) where ``held`` bool (n, L)."""
        return pooled(hidden, held, self.pooling)

    def extra_repr(self) -> str:
        """In which way."""
        return self.pooling
