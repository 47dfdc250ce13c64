"""Beside a paired test: how sure a difference is, how large, and how many seeds would show it."""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from cl_bench.report.rows import LEVEL, Block, Row

RESAMPLED = 5
"""Pairs from which on the interval is a bootstrap's; below, it is Student's."""

DRAWS = 1999
POWER = 0.8
MOST = 1000
"""Seeds; whoever would need more is told so."""

ABOUT = (
    "percent of ACC, row minus best row, over n common seeds: mean; 95 % interval (BCa bootstrap, "
    f"{DRAWS} draws; Student's below {RESAMPLED} seeds); effect (Hedges' g of the paired "
    "differences); seeds with which a paired t-test of this pair alone sees an effect of that size "
    "in 80 of 100 studies"
)


@dataclass(frozen=True)
class Evidence:
    """What the differences of pairs show.

    Attributes:
        n: pairs.
        mean: of the differences.
        low: end of the mean's 95 % interval.
        high: the other end.
        effect: mean over standard deviation, without its bias for few pairs (Hedges, 1981); NaN
            where all differences are equal.
        seeds: pairs that a paired t-test needs to see such an effect; None where that is not known,
            or is more than :data:`MOST`.
    """

    n: int
    mean: float
    low: float
    high: float
    effect: float
    seeds: int | None


def evidence(differences: NDArray[np.float64]) -> Evidence:
    """Of one row against another, a difference per common seed (n,), n at least 2."""
    n, mean = len(differences), float(differences.mean())
    if np.ptp(differences) == 0:
        return Evidence(n, mean, mean, mean, math.nan, None)
    std = float(differences.std(ddof=1))
    if n < RESAMPLED:
        half = float(stats.t.ppf(0.975, n - 1)) * std / math.sqrt(n)
        low, high = mean - half, mean + half
    else:
        found = stats.bootstrap(
            (differences,), np.mean, n_resamples=DRAWS, random_state=np.random.default_rng(0)
        )
        low, high = map(float, found.confidence_interval)
    effect = unbiased(n - 1) * mean / std
    return Evidence(n, mean, low, high, effect, needed(effect))


def unbiased(freedom: int) -> float:
    """By what a standardised mean is too large, inverted: J(m) of Hedges (1981)."""
    logs = math.lgamma(freedom / 2) - math.lgamma((freedom - 1) / 2) if freedom > 1 else -math.inf
    return math.exp(logs) / math.sqrt(freedom / 2)


def needed(effect: float) -> int | None:
    """Pairs with which a two-sided paired t-test at :data:`LEVEL` has :data:`POWER`."""
    if effect == 0:
        return None
    counts = range(2, MOST + 1)
    place = bisect.bisect_left(counts, POWER, key=lambda n: power(abs(effect), n))
    return counts[place] if place < len(counts) else None


def power(effect: float, n: int) -> float:
    """How often a paired t-test of n pairs sees an effect."""
    bar, away = float(stats.t.ppf(1 - LEVEL / 2, n - 1)), effect * math.sqrt(n)
    return float(stats.nct.sf(bar, n - 1, away) + stats.nct.cdf(-bar, n - 1, away))


def shown(block: Block) -> list[tuple[Row, Evidence]]:
    """The evidence of every row that is compared with the best one."""
    rows = {row.label: row for row in block.rows}
    return [
        (rows[label], evidence(np.array(found.pairs))) for label, found in block.comparisons.items()
    ]


def evidence_cells(block: Block, digits: int = 1) -> tuple[list[str], Sequence[Sequence[str]]]:
    """Header and rows as text; no rows where nothing is compared."""
    best = block.best("acc")
    header = [f"against {best.label}" if best else "", "n", "difference", "95 %", "effect", "seeds"]
    lines = []
    for row, one in shown(block):
        ends = (f"{100 * end:+.{digits}f}" for end in (one.low, one.high))
        effect = "-" if math.isnan(one.effect) else f"{one.effect:+.2f}"
        if one.seeds is None:
            seeds = f"> {MOST}" if one.effect and not math.isnan(one.effect) else "-"
        else:
            seeds = str(one.seeds)
        mean = f"{100 * one.mean:+.{digits}f}"
        lines.append([row.label, str(one.n), mean, " to ".join(ends), effect, seeds])
    return header, lines
