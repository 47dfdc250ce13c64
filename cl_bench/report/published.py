"""Ours beside the published numbers, with a verdict."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from cl_bench.report.quantities import METRICS
from cl_bench.report.rows import Row
from cl_bench.report.study import Study

LEAST = 0.5
"""The least tolerance, in points: what seeds and rounding of tables move a mean by."""

OURS = ("acc", "bwt")
"""What is shown of a row without a reference."""

MOST = 3.0
"""The most, in points: a published spread that is wider would let anything in."""

NONE = "no reference"


@dataclass(frozen=True)
class Verdict:
    """One published number and ours, in percent.

    Attributes:
        key: which summary of the accuracy matrix.
        published: its mean.
        std: its standard deviation; None where none is known.
        ours: mean over our seeds.
    """

    key: str
    published: float
    std: float | None
    ours: float

    @property
    def tolerance(self) -> float:
        """How far from the published mean ours may lie: 2 standard deviations, 0.5 to 3 points."""
        return min(max(2 * (self.std or 0.0), LEAST), MOST)

    @property
    def text(self) -> str:
        """The verdict in words."""
        if math.isnan(self.ours):
            return "not measured"
        off = self.ours - self.published
        if abs(off) <= self.tolerance:
            return "inside"
        side = "above" if off > 0 else "below"
        return f"{side.upper() if self.missed else side} by {abs(off) - self.tolerance:.2f}"

    @property
    def missed(self) -> bool:
        """Whether ours is worse than the tolerance allows."""
        _, better = METRICS[self.key]
        return better * (self.ours - self.published) < -self.tolerance


def verdicts(row: Row) -> list[Verdict]:
    """The verdict on every number that the row's configuration names; none without a reference."""
    if row.reference is None:
        return []
    return [judge(row.reference, k, 100 * row.mean(k)) for k in METRICS if k in row.reference]


def judge(reference: Mapping[str, Any], key: str, ours: float) -> Verdict:
    """One number of a reference against ours.

    Args:
        reference: means by key and standard deviations by ``<key>_std``, in percent.
        key: one of its keys, a summary of the accuracy matrix.
        ours: percent.
    """
    std = reference.get(f"{key}_std")
    return Verdict(key, float(reference[key]), None if std is None else float(std), ours)


def published_tables(study: Study) -> list[Table]:
    """A table for every block: published, how close ours must be, ours, verdict; sources below."""
    tables = []
    for block in study.blocks:
        known = "known" if block.task_id_known else "not known"
        table = Table(
            title=Text(f"{block.title}  task id {known} at test time"),
            title_justify="left",
            caption_justify="left",
            box=None,
            pad_edge=False,
            padding=(0, 2, 0, 0),
        )
        for name in ("strategy", "n", "", "published", "within", "ours", "verdict"):
            right = name in ("n", "published", "within", "ours")
            table.add_column(name, justify="right" if right else "left", no_wrap=True)
        sources = {str(r.reference.get("source")) for r in block.rows if r.reference}
        if sources:
            table.caption = Text("published: " + "; ".join(sorted(sources)))
        for row in block.rows:
            found = {verdict.key: verdict for verdict in verdicts(row)}
            for i, key in enumerate(found or OURS):
                verdict = found.get(key)
                table.add_row(
                    Text(row.label if i == 0 else ""),
                    str(row.n) if i == 0 else "",
                    METRICS[key][0],
                    _spread(verdict.published, verdict.std) if verdict else "",
                    f"{verdict.tolerance:.2f}" if verdict else "",
                    _spread(100 * row.mean(key), 100 * row.std(key)),
                    _said(verdict) if verdict else NONE,
                )
        tables.append(table)
    return tables


def _spread(mean: float, std: float | None) -> str:
    known = std is not None and not math.isnan(std)
    return f"{mean:.2f} ± {std:.2f}" if known else f"{mean:.2f}"


def _said(verdict: Verdict) -> Text:
    return Text(verdict.text, style="bold red" if verdict.missed else "green")
