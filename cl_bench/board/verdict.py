"""What a cell shows: a published band is reached, and the method is told from finetuning."""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from cl_bench.board.cells import Cell
from cl_bench.board.protocol import FINETUNE
from cl_bench.report.published import Verdict, judge

FEWEST = 3
"""Pairs of seed and order below which nothing is tested."""

RESAMPLED = 5
"""Seeds from which on the interval is a bootstrap's; below, it is Student's."""

DRAWS = 10_000

NONE = "no verdict"


@dataclass(frozen=True)
class Separation:
    """The difference of a method to finetuning in ACC, in points, over common seeds and orders.

    Attributes:
        n: common pairs.
        mean: of the differences.
        low: end of their mean's 95 % interval; NaN for too few pairs.
        high: the other end.
        naive: the name of what it is told from.
    """

    n: int
    mean: float
    low: float
    high: float
    naive: str = FINETUNE

    @property
    def told(self) -> bool:
        """Whether the method is better, beyond chance."""
        return self.low > 0

    @property
    def text(self) -> str:
        """In words."""
        if math.isnan(self.low):
            return f"{self.n} run{'s' if self.n != 1 else ''} in common with {self.naive}"
        ends = f"{self.mean:+.1f} ({self.low:+.1f} to {self.high:+.1f})"
        if self.told:
            return f"{ends}, told from {self.naive}"
        return f"{ends}, {'worse than' if self.high < 0 else 'not told from'} {self.naive}"


def separation(cell: Cell, finetune: Cell) -> Separation:
    """Pair a method's runs with finetuning's.

    With five seeds or more, seeds and orders are resampled, each as a whole (a paired bootstrap of
    10,000 draws, seed 0); with fewer the interval is that of a paired t-test.
    """
    mine, theirs = cell.by_pair(), finetune.by_pair()
    pairs = sorted(mine.keys() & theirs.keys(), key=str)
    gaps = {pair: mine[pair] - theirs[pair] for pair in pairs}
    n = len(gaps)
    if n < FEWEST or not all(map(math.isfinite, gaps.values())):
        mean = float(np.mean(list(gaps.values()))) if gaps else math.nan
        return Separation(n, mean, math.nan, math.nan, finetune.method)
    seeds, orders = sorted({s for s, _ in pairs}), sorted({o for _, o in pairs}, key=str)
    mean = float(np.mean(list(gaps.values())))
    if len(seeds) >= RESAMPLED and n == len(seeds) * len(orders):
        table = np.array([[gaps[seed, order] for order in orders] for seed in seeds])
        draw = np.random.default_rng(0)
        rows = draw.integers(len(seeds), size=(DRAWS, len(seeds)))
        columns = draw.integers(len(orders), size=(DRAWS, len(orders)))
        means = table[rows[:, :, None], columns[:, None, :]].mean((1, 2))
        low, high = np.quantile(means, (0.025, 0.975))
    else:
        half = stats.t.ppf(0.975, n - 1) * np.std(list(gaps.values()), ddof=1) / math.sqrt(n)
        low, high = mean - half, mean + half
    return Separation(n, mean, float(low), float(high), finetune.method)


@dataclass(frozen=True)
class Finding:
    """What is said of a cell.

    Attributes:
        text: the verdict.
        band: the published ACC and ours, where one is known.
        apart: from finetuning; None for finetuning itself, or where it was not run.
        discriminates: whether finetuning misses the band: one that it reaches shows nothing.
        judged: whether there is a verdict.
    """

    text: str
    band: Verdict | None
    apart: Separation | None
    discriminates: bool
    judged: bool

    @property
    def deviation(self) -> str:
        """Ours minus published, in points."""
        return "" if self.band is None else f"{self.band.ours - self.band.published:+.2f}"


def find(cell: Cell, finetune: Cell | None) -> Finding:
    """The verdict on a cell: a band is only reached by what is told from finetuning, too."""
    band = None
    acc = float(cell.values("acc").mean())
    if cell.reference and cell.reference.get("acc") is not None:
        band = judge(cell.reference, "acc", acc)
    naive = finetune is not None and finetune.method == cell.method
    apart = None if finetune is None or naive else separation(cell, finetune)
    base = math.nan if finetune is None else float(finetune.values("acc").mean())
    known = band is not None and not math.isnan(base)
    outside = known and judge(cell.reference or {}, "acc", base).missed
    text = _text(band, apart, outside, naive)
    judged = not naive and not text.startswith(NONE)
    return Finding(text, band, apart, outside and not naive, judged)


def _text(band: Verdict | None, apart: Separation | None, outside: bool, naive: bool) -> str:
    if naive:
        return "the lower bound" if band is None else f"the lower bound, {band.text}"
    if apart is None:
        return f"{NONE}: finetune was not run"
    if math.isnan(apart.low):
        return f"{NONE}: {apart.text}"
    if band is not None and band.missed:
        return f"missed: {band.text}"
    if band is not None and not outside:
        return f"{band.text}, and {apart.naive} reaches the band, too: it does not discriminate"
    said = apart.text.rpartition(", ")[2]
    if band is None:
        return said
    return f"reached: {band.text}" if apart.told else f"{band.text}, but {said}"
