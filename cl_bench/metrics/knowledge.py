"""Drops of accuracy, split into lost knowledge and lost alignment.

That a task's performance takes knowledge (the facts) and alignment (how the task is done with them)
is the view of Zheng et al., ICLR 2025, and so is the treatment: of a task's two disjoint halves,
neither of which tells anything about the other's answers, one is learned anew for a few steps; what
the other half then scores is the *recovered performance* R, a proxy for knowledge. The formulas,
and that performance is the product of the two, are ours; the paper's own could not be checked. With
p the performance on that half before, and a star for right after the task was learned::

    alignment ratio   A   = p / R                     in [0, 1]
    total drop        D   = p* - p
    knowledge drop    D_K = R* - R
    alignment drop    D_A = D - D_K
    spurious fraction     = 1 - max(D_K, 0) / D       1: nothing was lost but alignment

That means something only if a model that never saw the second half's facts stays at chance under
that treatment (the control), and where there was a drop to explain.
"""

import math

LEAST_DROP = 0.05
"""Drops of no more than this are not taken apart: they are noise."""


def alignment_ratio(performance: float, recovered: float) -> float:
    """P / R, clipped to [0, 1]; NaN where nothing could be recovered."""
    return min(max(performance / recovered, 0.0), 1.0) if recovered > 0 else math.nan


def spurious_fraction(drop: float, knowledge_drop: float) -> float:
    """1 - max(D_K, 0) / D; NaN for D <= :data:`LEAST_DROP`."""
    return 1 - max(knowledge_drop, 0.0) / drop if drop > LEAST_DROP else math.nan


def at_chance(control: float, chance: float, samples: int) -> bool:
    """Whether the control is at most three standard deviations above chance.

    Args:
        control: its score, in [0, 1].
        chance: what knowing nothing but the frequencies of answers scores.
        samples: questions that the control was asked.
    """
    return control <= chance + 3 * math.sqrt(chance * (1 - chance) / samples)


def drops(
    performance: float,
    recovered: float,
    performance_learned: float,
    recovered_learned: float,
    control_holds: bool,
) -> dict[str, float]:
    """Drops since a task was learned.

    Args:
        performance: p.
        recovered: R.
        performance_learned: p* right after the task was learned.
        recovered_learned: R* then.
        control_holds: whether there is a control and it stayed at chance, then and now.

    Returns:
        ``drop``, ``knowledge_drop``, ``alignment_drop``, ``spurious_fraction``.
    """
    drop = performance_learned - performance
    lost = recovered_learned - recovered
    return {
        "drop": drop,
        "knowledge_drop": lost,
        "alignment_drop": drop - lost,
        "spurious_fraction": spurious_fraction(drop, lost) if control_holds else math.nan,
    }
