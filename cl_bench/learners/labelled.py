"""Logits only where labels are: of a long prompt with a short answer, almost none."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def logits_at(places: Tensor, head: nn.Module, forward: Callable[[], Tensor]) -> Tensor:
    """The logits (m, vocabulary) at some positions, without the others being made.

    Args:
        places: int64 (m,), positions in the batch's flat sequences.
        head: the output layer.
        forward: runs the model, and returns its logits (n, L, vocabulary).
    """

    def chosen(_: nn.Module, given: tuple[Any, ...]) -> tuple[Tensor, ...]:
        hidden: Tensor = given[0]
        whole.append(hidden.shape[:-1].numel())
        return (hidden.flatten(0, -2)[places][None], *given[1:])

    whole: list[int] = []
    # First of all, so that whatever else looks at the layer sees what it computes.
    handle = head.register_forward_pre_hook(chosen, prepend=True)
    try:
        logits = forward()
    finally:
        handle.remove()
    # Some models use the layer's weight without calling it.
    return logits[0] if whole else logits.flatten(0, 1)[places]
