"""Tables that a paper can print: ``booktabs``, a label, a caption of one sentence.

The preamble needs the packages booktabs and graphicx; a table that is wider
than the column is scaled down to it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cl_bench.contracts import UsageError
from cl_bench.report.escape import latex
from cl_bench.report.quantities import COSTS, METRICS, format_cost
from cl_bench.report.rows import LEVEL, Block, Row

PREAMBLE = "% needs \\usepackage{booktabs} and \\usepackage{graphicx}\n"
KNOWN = {True: "task id known at test time", False: "task id not known at test time"}
DAGGER = "$^\\dagger$"
ARROWS = {1: " $\\uparrow$", -1: " $\\downarrow$"}
FITTED = "\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%"


@dataclass(frozen=True)
class Wishes:
    """What a table or a figure shows of a block, and what it calls it.

    Attributes:
        columns: keys of metrics and costs, ``n`` and ``p``; empty: n, every metric, p.
        rows: labels, in the order in which they stand; empty: all.
        names: what labels and columns are called instead.
        label: of the table, to refer to.
        caption: in place of ours, as LaTeX.
        digits: decimals of scores.
    """

    columns: Sequence[str] = ()
    rows: Sequence[str] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    label: str = ""
    caption: str = ""
    digits: int = 2

    def chosen(self, block: Block) -> list[Row]:
        """The rows of a block that are shown.

        Raises:
            UsageError: one is not there.
        """
        by_label = {row.label: row for row in block.rows}
        for label in self.rows:
            if label not in by_label:
                there = ", ".join(by_label)
                raise UsageError(f"--rows {label}: {block.title} has no such row; it has {there}")
        return [by_label[label] for label in self.rows] or block.rows

    def name(self, key: str, given: str) -> str:
        """What something is called in print."""
        return self.names.get(key, given)


def latex_table(block: Block, wishes: Wishes | None = None) -> str:
    """One table of a block.

    A score is bold only where the paired test tells the best row from every other one.

    Raises:
        UsageError: a column or a row is not there.
    """
    wishes = wishes or Wishes()
    rows, columns = wishes.chosen(block), _columns(block, wishes)
    marked = {key: block.carried(key) for key in columns if key in METRICS}
    lines = []
    for row in rows:
        flag = DAGGER if row.selection else ""
        bound = f" ({row.bound} bound)" if row.bound and row.label not in wishes.names else ""
        cells = [f"{latex(wishes.name(row.label, row.label))}{latex(bound)}{flag}"]
        cells += [_cell(block, row, key, marked.get(key) is row, wishes.digits) for key in columns]
        lines.append(f"      {' & '.join(cells)} \\\\")
    header = [latex(wishes.name("strategy", "strategy")), *(_head(key, wishes) for key in columns)]
    caption = wishes.caption or _caption(
        block, rows, any(row is not None for row in marked.values())
    )
    return "\n".join(
        [
            "\\begin{table}",
            "  \\centering",
            f"  \\caption{{{caption}}}",
            *([f"  \\label{{{wishes.label}}}"] if wishes.label else []),
            f"  {FITTED}",
            f"    \\begin{{tabular}}{{l{'r' * len(columns)}}}",
            "      \\toprule",
            f"      {' & '.join(header)} \\\\",
            "      \\midrule",
            *lines,
            "      \\bottomrule",
            "    \\end{tabular}}",
            "\\end{table}",
        ]
    )


def _columns(block: Block, wishes: Wishes) -> list[str]:
    shown = block.shown()
    if not wishes.columns:
        return ["n", *shown, *(["p"] if block.comparisons else [])]
    for key in wishes.columns:
        if key not in ("n", "p", *COSTS) and key not in shown:
            there = ", ".join(("n", *shown, "p", *COSTS))
            raise UsageError(f"--columns {key}: {block.title} has no such column; it has {there}")
    return list(wishes.columns)


def _head(key: str, wishes: Wishes) -> str:
    if key in METRICS:
        title, better = METRICS[key]
        return f"{latex(wishes.name(key, title))}{ARROWS[better]}"
    return latex(wishes.name(key, COSTS.get(key, key)))


def _cell(block: Block, row: Row, key: str, bold: bool, digits: int) -> str:
    if key == "n":
        return str(row.n)
    if key == "p":
        return _p(block, row)
    if key in COSTS:
        return latex(format_cost(key, row.cost(key)))
    mean, std = 100 * row.mean(key), 100 * row.std(key)
    if math.isnan(mean):
        return "--"
    number = f"{mean:.{digits}f}"
    number = number.lstrip("-") if float(number) == 0 else number
    number = f"\\mathbf{{{number}}}" if bold else number
    return f"${number}$" if math.isnan(std) else f"${number} \\pm {std:.{digits}f}$"


def _p(block: Block, row: Row) -> str:
    if row is block.best("acc"):
        return "best"
    found = block.comparisons.get(row.label)
    if found is None or math.isnan(found.p):
        return ""
    return "$< 0.001$" if found.p < 0.001 else f"${found.p:.3f}$"


def _caption(block: Block, rows: Sequence[Row], marked: bool) -> str:
    """One sentence."""
    seeds = sorted({row.n for row in rows})
    several = seeds[-1] > 1
    over = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else str(seeds[0])
    what = f"Mean and standard deviation over {over} seeds" if several else "Scores of one seed"
    parts = [latex(f"{what} in percent on {block.title}, {KNOWN[block.task_id_known]}")]
    test = f"a paired t-test (Holm-adjusted, $p < {LEVEL:g}$)"
    if marked:
        parts.append(f"bold is the best where {test} tells it from every other row")
    elif len([row for row in block.rows if not row.bound]) > 1:
        parts.append(f"none is marked as the best, for {test} tells none from every other row")
    flagged = next((row.selection for row in rows if row.selection), None)
    if flagged:
        tasks = latex(", ".join(flagged["tasks"]))
        parts.append(f"{DAGGER} with hyperparameters chosen on validation data of {tasks}")
    return "; ".join(parts) + "."
