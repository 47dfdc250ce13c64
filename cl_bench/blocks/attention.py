"""Further keys and values for attention, which a block computes as ever.

Blocks differ in how they make queries, keys and values of hidden states, and agree on torch's
``scaled_dot_product_attention`` for what follows: there the prefixes join. Prefixes are cut into
heads as a block's own keys are, and every position reads them, whatever a mask says of the others.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cl_bench.blocks.block import Block
from cl_bench.contracts import Learner, UsageError

Prefix = tuple[Tensor, Tensor]
"""Keys and values (n, P, d) of every sample, before they are cut into heads."""


class FurtherKeys(TorchFunctionMode):
    """Inside, attention reads prefixes too.

    Args:
        prefixes: by the attention that they are for, in the order of computing, from 0.

    Attributes:
        calls: how many attentions were computed inside.
        causal: whether positions of one of them read earlier ones alone.
    """

    def __init__(self, prefixes: Mapping[int, Prefix]) -> None:
        super().__init__()
        self.prefixes = prefixes
        self.calls = 0
        self.causal = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return self._attention(*args, **kwargs)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        self.causal |= bool(kwargs.get("is_causal", False) or args[1:2] == (True,))
        prefix = self.prefixes.get(self.calls)
        self.calls += 1
        if prefix is not None:
            key, value = (
                torch.cat([_by_heads(more, own), own], dim=2)
                for more, own in zip(prefix, (key, value), strict=True)
            )
        if attn_mask is not None:
            attn_mask = _widened(attn_mask, query.shape[2], key.shape[2])
        return F.scaled_dot_product_attention(query, key, value, attn_mask, *args, **kwargs)


def _by_heads(prefix: Tensor, own: Tensor) -> Tensor:
    """(n, heads, P, d / heads), of the kind of a block's own keys (n, heads, L, d / heads)."""
    n, heads, _, width = own.shape
    return prefix.to(own).reshape(n, -1, heads, width).transpose(1, 2)


def _widened(mask: Tensor, queries: int, keys: int) -> Tensor:
    """A mask (..., Lq, Lk) for as many queries and keys: the first ones are further ones.

    All keys that came first may be read; queries that came first read what the others' first may.
    """
    more = keys - mask.shape[-1]
    if more > 0:
        free = mask.new_ones if mask.dtype == torch.bool else mask.new_zeros
        mask = torch.cat([free(*mask.shape[:-1], more), mask], dim=-1)
    more = queries - mask.shape[-2]
    if mask.shape[-2] > 1 and more > 0:
        mask = torch.cat([mask[..., :1, :].expand(*mask.shape[:-2], more, -1), mask], dim=-2)
    return mask


@torch.no_grad()
def require_attention(learner: Learner, blocks: list[Block], who: str) -> None:
    """Every block must compute attention once, over all positions, where prefixes can join it.

    Raises:
        UsageError: it does not.
    """
    batch = learner.example()
    with learner.evaluating(), FurtherKeys({}) as found:
        learner.features(batch)
    kind = type(blocks[0].module).__name__
    if found.calls != len(blocks):
        raise UsageError(
            f"{who} adds to what attention reads, and {found.calls} of the network's {len(blocks)} "
            f"blocks ({kind}) compute it by torch's scaled_dot_product_attention: load the model "
            "with that (transformers: attn_implementation=sdpa)"
        )
    if found.causal:
        raise UsageError(
            f"{who} needs attention over all positions, and this network's ({kind}) reads from "
            "left to right: use a ViT or an encoder of text"
        )
