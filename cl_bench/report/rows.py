"""The same run under several seeds, a row; rows that can be compared, a block.

Mean and spread over seeds, paired tests against the best row, and costs that differ too much.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from scipy import stats

from cl_bench.metrics import Matrix, intransigence
from cl_bench.report.quantities import COSTS, METRICS, format_cost
from cl_bench.report.trials import Trial

TOLERANCE = 0.10
"""Rows whose costs differ by more than this share are not compared without a warning."""

LEVEL = 0.05
"""Of the paired test, for a best row that print may mark."""


@dataclass
class Row:
    """Runs that differ in their seed alone.

    Attributes:
        label: strategy, and what tells it from other rows of that strategy.
        trials: by seed, one each.
        upper: the upper bound of its block, if there is one.
    """

    label: str
    trials: list[Trial]
    upper: "Row | None" = field(default=None, repr=False)

    @property
    def strategy(self) -> str:
        """What all its runs have."""
        return self.trials[0].strategy

    @property
    def bound(self) -> str | None:
        """``lower`` or ``upper`` where others lie above or below it."""
        return self.trials[0].bound

    @property
    def n(self) -> int:
        """How many seeds."""
        return len(self.trials)

    @property
    def seeds(self) -> list[int]:
        """Of its runs."""
        return [trial.seed for trial in self.trials]

    @property
    def matrices(self) -> Matrix:
        """R of every seed, (n, T + 1, T)."""
        return np.stack([trial.run.matrix for trial in self.trials])

    @property
    def selection(self) -> Mapping[str, Any] | None:
        """How its hyperparameters were chosen, if they were."""
        return self.trials[0].selection

    @property
    def reference(self) -> Mapping[str, Any] | None:
        """Published numbers for this strategy in this setting."""
        found = self.trials[0].reference
        return found if found and found.get("strategy", self.strategy) == self.strategy else None

    @cached_property
    def values(self) -> dict[str, Matrix]:
        """Every metric, a value per seed, in [0, 1]; NaN where it is not defined."""
        found = {
            key: np.array([trial.metrics[key] for trial in self.trials])
            for key in METRICS
            if key != "intransigence"
        }
        found["intransigence"] = np.array([self._intransigence(t) for t in self.trials])
        return found

    def _intransigence(self, trial: Trial) -> float:
        if self.upper is None or self.upper is self:
            return math.nan
        same = [t for t in self.upper.trials if t.seed == trial.seed]
        if not same:
            return math.nan
        return intransigence(trial.run.matrix, same[0].run.matrix)

    def mean(self, metric: str) -> float:
        """Over seeds."""
        return float(self.values[metric].mean())

    def std(self, metric: str) -> float:
        """Over seeds, of the sample (n - 1); NaN for one seed."""
        return float(self.values[metric].std(ddof=1)) if self.n > 1 else math.nan

    def cost(self, name: str) -> float:
        """Mean over seeds of an entry of ``summary.json``; NaN if a run lacks it."""
        found = [trial.summary.get(name) for trial in self.trials]
        return math.nan if None in found else float(np.mean(np.array(found, dtype=float)))


@dataclass(frozen=True)
class Comparison:
    """A paired test of one row against the best of its block.

    Attributes:
        p: two-sided, adjusted by Holm's procedure over the block's comparisons.
        n: common seeds.
        difference: mean of the row minus the best, in [0, 1].
    """

    p: float
    n: int
    difference: float


@dataclass
class Block:
    """Rows that can be compared.

    Attributes:
        title: stream, and what tells it from other blocks of it.
        stream: its name.
        task_id_known: at test time, for all of them.
        rows: bounds first and last, the others by ACC.
    """

    title: str
    stream: str
    task_id_known: bool
    rows: list[Row]

    @property
    def task_names(self) -> list[str]:
        """Columns of the matrices."""
        return self.rows[0].trials[0].run.task_names

    def best(self, metric: str) -> Row | None:
        """The row with the best mean, bounds aside; None where there is nothing to compare."""
        found = [r for r in self.rows if not r.bound and not math.isnan(r.mean(metric))]
        sign = METRICS[metric][1]
        return max(found, key=lambda row: sign * row.mean(metric)) if len(found) > 1 else None

    def shown(self) -> list[str]:
        """Metrics that some row has."""
        return [k for k in METRICS if any(not math.isnan(r.mean(k)) for r in self.rows)]

    @cached_property
    def comparisons(self) -> dict[str, Comparison]:
        """By label: paired t-tests of ACC against the best row, where three seeds are common."""
        return self.compared("acc")

    def compared(self, metric: str) -> dict[str, Comparison]:
        """As :attr:`comparisons`, of any metric."""
        best = self.best(metric)
        if best is None:
            return {}
        raw: dict[str, Comparison] = {}
        for row in self.rows:
            if row is best or row.bound:
                continue
            common = sorted(set(row.seeds) & set(best.seeds))
            if len(common) < 3:
                continue
            mine, theirs = (
                np.array([r.values[metric][r.seeds.index(seed)] for seed in common])
                for r in (row, best)
            )
            difference = mine - theirs
            # Equal in every seed, or apart by the same number: there is no spread to test with.
            if np.ptp(difference) == 0:
                p = 1.0 if difference[0] == 0 else math.nan
            else:
                p = float(stats.ttest_rel(mine, theirs).pvalue)
            raw[row.label] = Comparison(p, len(common), float(difference.mean()))
        return holm(raw)

    def carried(self, metric: str) -> Row | None:
        """The best row, where the paired test tells it from every other one at :data:`LEVEL`."""
        best, found = self.best(metric), self.compared(metric)
        others = [row.label for row in self.rows if row is not best and not row.bound]
        told = all(label in found and found[label].p < LEVEL for label in others)
        return best if told else None

    def warnings(self) -> list[str]:
        """Costs in which rows differ by more than :data:`TOLERANCE`."""
        found = []
        for name, title in COSTS.items():
            rows = [r for r in self.rows if not (name == "exemplars" and r.bound)]
            costs = [(row.cost(name), row.label) for row in rows]
            known = [c for c in costs if not math.isnan(c[0])]
            if len(known) < 2:
                continue
            (least, low), (most, high) = min(known), max(known)
            if most > (1 + TOLERANCE) * least:
                apart = f"{most / least:.2f} times" if least > 0 else "from nothing"
                found.append(
                    f"{title}: {apart}, {format_cost(name, least)} ({low}) to "
                    f"{format_cost(name, most)} ({high})"
                )
        return found


def holm(raw: Mapping[str, Comparison]) -> dict[str, Comparison]:
    """Holm (1979): the k-th smallest of m p-values times m - k + 1, never falling."""
    ordered = sorted((c.p, label) for label, c in raw.items() if not math.isnan(c.p))
    adjusted, highest = {}, 0.0
    for k, (p, label) in enumerate(ordered):
        highest = max(highest, min(1.0, p * (len(ordered) - k)))
        adjusted[label] = highest
    return {
        label: Comparison(adjusted.get(label, math.nan), c.n, c.difference)
        for label, c in raw.items()
    }
