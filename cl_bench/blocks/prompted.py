"""A network that reads prompts beside its inputs, each sample its own.

Prefix tuning (Li and Liang, ACL 2021) hands keys and values to the attention of chosen blocks;
prompt tuning (Lester et al., EMNLP 2021) puts positions before what the first block reads.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cl_bench.blocks.attention import FurtherKeys, Prefix
from cl_bench.blocks.block import Block
from cl_bench.contracts import Batch, Learner, UsageError


@dataclass(frozen=True)
class Prompts:
    """What a batch of n samples is given.

    Attributes:
        prefixes: keys and values, each (n, P, d), by the block that reads them, from 0.
        positions: hidden states (n, P, d) before those that the first block reads. The network's
            answer follows then from the mean of what its last layer makes of them.
    """

    prefixes: Mapping[int, Prefix] = field(default_factory=dict)
    positions: Tensor | None = None


class Prompted:
    """Prompts for every ``learner(batch)``, from now on until :meth:`remove`.

    ``learner.features(batch)`` stays what the network says without prompts.

    Args:
        learner: whose network it is.
        blocks: its blocks.
        give: the prompts of a batch; asked before every pass, with gradients where these are on.
        pool: what makes one vector of all positions, (hidden (n, L, d), held (n, L)) to (n, d);
            needed for prompts that are positions.
    """

    def __init__(
        self,
        learner: Learner,
        blocks: Sequence[Block],
        give: Callable[[Batch], Prompts],
        pool: nn.Module | None = None,
    ) -> None:
        self.give = give
        self._prompts: Prompts | None = None
        self._keys: FurtherKeys | None = None
        self._handles: list[RemovableHandle] = [
            learner.network.register_forward_pre_hook(self._begin),
            learner.network.register_forward_hook(self._end, always_call=True),
        ]
        if pool is not None:
            first = blocks[0].module
            self._handles += [
                first.register_forward_pre_hook(self._put_before, with_kwargs=True),
                pool.register_forward_pre_hook(self._pool_prompts),
            ]

    def _begin(self, network: nn.Module, given: tuple[Any, ...]) -> None:
        # Lightning calls a wrapped network in place of its training step: that is no pass.
        if getattr(network.forward, "__func__", None) is not type(network).forward:
            return
        prompts = self.give(given[0])
        self._keys = FurtherKeys(prompts.prefixes)
        self._prompts = prompts
        self._keys.__enter__()  # type: ignore[no-untyped-call]

    def _end(self, network: nn.Module, given: tuple[Any, ...], out: Any) -> None:
        keys, self._keys, self._prompts = self._keys, None, None
        if keys is not None:
            keys.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    @property
    def _positions(self) -> Tensor | None:
        return None if self._prompts is None else self._prompts.positions

    def _put_before(
        self, block: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._positions is None:
            return None
        hidden, *rest = given
        return (torch.cat([self._positions.to(hidden), hidden], dim=1), *rest), named

    def _pool_prompts(
        self, pool: nn.Module, given: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        if self._positions is None:
            return None
        hidden, held = given
        mean = hidden[:, : self._positions.shape[1]].mean(1, keepdim=True)
        return mean, held.new_ones(len(mean), 1)

    def remove(self) -> None:
        """The network reads its inputs alone again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def pool_of(learner: Learner, who: str) -> nn.Module:
    """The module that makes one vector of all positions; ours say so by ``pools``.

    Raises:
        UsageError: there is none, or are several.
    """
    found = [m for m in learner.network.modules() if getattr(m, "pools", False) is True]
    if len(found) != 1:
        raise UsageError(
            f"{who} answers by what the network makes of its prompts, and this network does not "
            "tell which module pools its positions: use model=vit_tiny, model=minilm or "
            "model=encoder"
        )
    return found[0]
