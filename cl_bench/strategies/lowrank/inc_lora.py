"""Incremental low-rank adaptation ("IncLoRA"), the baseline of O-LoRA (Wang et al., 2023).

Every task t learns a pair of its own, W_t = W_{t-1} + alpha / r B_t A_t; earlier pairs stay as they
are, and nothing keeps the new one out of their way: O-LoRA with lambda1 = lambda2 = 0.
"""

from cl_bench.strategies.lowrank.pairs import LowRankPairs


class IncLoRA(LowRankPairs):
    """A low-rank pair per task, without penalties."""
