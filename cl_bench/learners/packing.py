"""Several samples in one sequence, none of which sees another.

Samples of a batch are put into as few sequences as keep nearly every position filled; positions
begin at 0 with every sample, from which transformers' models tell where one ends. A batch stays
one of samples to everybody else: only the pass through the network is packed.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cl_bench.contracts import UsageError

FILLED = 0.97
"""Share of the positions that holds tokens, at least."""


@dataclass(frozen=True)
class Packed:
    """A batch of samples as sequences.

    Attributes:
        tokens: int64 (r, C).
        positions: int64 (r, C): of every token in its sample; padding has 0.
        places: int64 (n, L): where a sample's token stands in the flat sequences.
    """

    tokens: Tensor
    positions: Tensor
    places: Tensor


def arranged(lengths: Sequence[int], single: bool = False) -> tuple[list[tuple[int, int]], int]:
    """Where samples go: each one's (row, start), and the length C of all rows.

    As many rows as leave at least :data:`FILLED` of them filled: attention's work grows with C.

    Args:
        lengths: of the samples, at least one of them not 0.
        single: one row for all.
    """
    total = sum(lengths)
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    rows = 1 if single else max(1, total // max(lengths))
    while True:
        ends = [(0, row) for row in range(rows)]
        starts = [(0, 0)] * len(lengths)
        for i in longest_first:
            end, row = heapq.heappop(ends)
            starts[i] = (row, end)
            heapq.heappush(ends, (end + lengths[i], row))
        width = max(end for end, _ in ends)
        if rows == 1 or total >= FILLED * rows * width:
            return starts, width
        rows -= max(1, rows // 8)


def pack(tokens: Tensor, mask: Tensor, pad: int, single: bool = False) -> Packed:
    """Samples (n, L) that are padded on the right, as sequences.

    Args:
        tokens: int64 (n, L).
        mask: of the same shape: 0 for padding.
        pad: token of padding.
        single: one sequence, as kernels for samples of any length take it.
    """
    held = mask.bool()
    starts, width = arranged(held.sum(1).tolist(), single)
    first = torch.tensor([row * width + start for row, start in starts], device=tokens.device)
    within = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    places = first[:, None] + within
    size = width * (1 + max(row for row, _ in starts))
    packed = tokens.new_full((size,), pad).index_put((places[held],), tokens[held])
    positions = torch.zeros_like(packed).index_put((places[held],), within[held])
    return Packed(packed.view(-1, width), positions.view(-1, width), places)


def is_single(model: Any) -> bool:
    """Whether the model's attention takes packed samples in one sequence alone."""
    return "flash" in str(model.config.get_text_config()._attn_implementation)


@torch.no_grad()
def require_boundaries(model: Any) -> None:
    """Raise :class:`UsageError` unless packed samples do not see each other in ``model``.

    Found by trying: what a sample's logits owe to the one before it, against what they would owe
    to the same tokens inside one sample; and whether they are those of the sample alone.
    """
    device = next(model.parameters()).device
    most = model.config.get_text_config().vocab_size
    before, other, text = (
        torch.arange(start, start + 5, device=device) % most for start in (1, 11, 21)
    )
    training = model.training
    model.eval()
    try:
        alone = _said(model, [text])
        after, changed = _said(model, [before, text]), _said(model, [other, text])
        inside = _said(model, [torch.cat([before, text])])
    except TypeError as error:  # no positions can be told
        raise _refusal(model, f"takes no positions ({error})") from None
    finally:
        model.train(training)
    inside = inside[len(text) :]
    owed = (inside - alone).abs().max()
    leak = max((after - changed).abs().max(), (after - alone).abs().max())
    exact = next(model.parameters()).dtype in (torch.float32, torch.float64)
    if not leak <= (0.02 if exact else 0.1) * owed:
        raise _refusal(model, "lets packed samples see each other")


def _said(model: Any, samples: Sequence[Tensor]) -> Tensor:
    """Logits of the last sample of a packed sequence, in float64."""
    tokens = torch.cat(list(samples))
    positions = torch.cat([torch.arange(len(s), device=s.device) for s in samples])
    found = model(input_ids=tokens[None], position_ids=positions[None], use_cache=False)
    logits: Tensor = found.logits[0, -len(samples[-1]) :].double()
    return logits


def _refusal(model: Any, why: str) -> UsageError:
    return UsageError(
        f"learner.packing=true: {type(model).__name__} {why}, so that other things would be learned"
        " than without; use learner.packing=false"
    )
