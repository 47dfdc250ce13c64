"""Ours beside the published numbers, with a verdict."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from cl_bench.report.study import Row, Study

LEAST = 0.5
"""Half-width of the narrowest band, in points: what seeds and rounding of tables move a mean by."""

METRICS = {"acc": "ACC", "bwt": "BWT"}
NONE = "no verified reference"


@dataclass(frozen=True)
class Verdict:
    """One published number and ours, in percent.

    Attributes:
        metric: ``ACC`` or ``BWT``.
        published: its mean.
        band: how far from it ours may lie, max(2 standard deviations, 0.5 points).
        ours: mean over our seeds.
    """

    metric: str
    published: float
    band: float
    ours: float

    @property
    def text(self) -> str:
        """In words."""
        if math.isnan(self.ours):
            return "not measured"
        off = self.ours - self.published
        if abs(off) <= self.band:
            return "inside"
        return f"{'above' if off > 0 else 'BELOW'} by {abs(off) - self.band:.2f}"


def verdicts(row: Row) -> list[Verdict]:
    """Of every number that the row's configuration names; none without a reference."""
    if row.reference is None:
        return []
    return [judge(row.reference, key, 100 * row.mean(key)) for key in METRICS]


def judge(reference: Mapping[str, Any], key: str, ours: float) -> Verdict:
    """One number of a reference against ours.

    Args:
        reference: ``acc``, ``acc_std``, ``bwt``, ``bwt_std`` in percent.
        key: ``acc`` or ``bwt``.
        ours: percent.
    """
    published = float(reference.get(key, math.nan))
    band = max(2 * float(reference.get(f"{key}_std") or 0.0), LEAST)
    return Verdict(METRICS[key], published, band, ours)


def published_tables(study: Study) -> list[Table]:
    """A table for every block: published, ours, verdict; sources below."""
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
        for name in ("strategy", "n", "", "published", "ours", "verdict"):
            right = name in ("n", "published", "ours")
            table.add_column(name, justify="right" if right else "left", no_wrap=True)
        sources = {str(r.reference.get("source")) for r in block.rows if r.reference}
        if sources:
            table.caption = Text("published: " + "; ".join(sorted(sources)))
        for row in block.rows:
            found = verdicts(row)
            if not found:
                ours = " / ".join(f"{100 * row.mean(key):.2f}" for key in METRICS)
                table.add_row(Text(row.label), str(row.n), "ACC / BWT", "", ours, NONE)
            for i, verdict in enumerate(found):
                key = verdict.metric.lower()
                missed = verdict.text.startswith("BELOW")
                table.add_row(
                    Text(row.label if i == 0 else ""),
                    str(row.n) if i == 0 else "",
                    verdict.metric,
                    f"{verdict.published:.2f} ± {verdict.band:.2f}",
                    f"{verdict.ours:.2f} ± {100 * row.std(key):.2f}",
                    Text(verdict.text, style="bold red" if missed else "green"),
                )
        tables.append(table)
    return tables
