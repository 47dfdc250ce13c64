"""How far what a network says has moved: the Kullback-Leibler divergence from where it was.

Shenfeld, Pari & Agrawal ("RL's Razor: why online reinforcement learning forgets less", 2025) relate
forgetting to this divergence, taken on the new task's inputs.
"""

from torch import Tensor


def divergence(start: Tensor, now: Tensor) -> float:
    """Mean over rows of KL(p_start || p_now), in nats.

    Args:
        start: log-probabilities (n, C) before; minus infinity is 0 by definition, 0 log 0 = 0.
        now: the same after.
    """
    start, now = start.double(), now.double()
    terms = start.exp() * (start - now)
    return float(terms.masked_fill(start.isneginf(), 0.0).sum(1).mean())
