"""Incremental low-rank adaptation ("IncLoRA"), the baseline of O-LoRA (Wang et al., 2023).

Every task t learns a pair of its own, W_t = W_{t-1} + alpha / r B_t A_t; earlier pairs stay as they
are, and nothing keeps the new one out of their way: O-LoRA with lambda1 = lambda2 = 0.
"""

from collections.abc import Sequence
from typing import Literal

from cl_bench.contracts.options import Count, PartShare, Rate
from cl_bench.strategies.o_lora import OLoRA


class IncLoRA(OLoRA):
    """A low-rank pair per task, without penalties.

    Args:
        rank, alpha, dropout, targets, full_first: as in :class:`OLoRA`.
    """

    def __init__(
        self,
        rank: Count = 8,
        alpha: Rate = 32.0,
        dropout: PartShare = 0.1,
        targets: Sequence[str] | Literal["all"] | None = None,
        full_first: bool = False,
    ) -> None:
        super().__init__(rank, alpha, dropout, 0.0, 0.0, targets, full_first)
