"""Figures of a block for print: vectors, as wide as asked for, no label on another.

Rows are told apart by colour, dash and marker together, so twenty of them are, and in grey too.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

from cl_bench.contracts import UsageError
from cl_bench.report.latex import Wishes
from cl_bench.report.plots import STYLE, _figure, accuracy_matrix_figure
from cl_bench.report.quantities import COSTS, METRICS
from cl_bench.report.rows import Block, Row

PRINT: Any = {
    **STYLE,
    "font.size": 8.0,
    "axes.titlesize": 8.0,
    "legend.fontsize": 7.0,
    "axes.labelcolor": "black",
    "pdf.fonttype": 42,  # outlines that publishers take
    "svg.hashsalt": "cl_bench",  # the same runs, the same bytes
}
PALETTE = ("#2463b4", "#d1690e", "#118a5e", "#a6429b", "#9a7400", "#c23b3b", "#1f8a98", "#6b4fbb")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
BOUNDS = {"lower": "<", "upper": ">"}
BOUND = "#777777"
LINE = 0.155
"""Inches that an entry of a legend, or a row, takes."""

FORMATS = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
"""What is written, and what of its metadata would be another every time."""


def write_figure(figure: Figure, path: Path) -> bytes:
    """The bytes of a vector figure in the format that the file's name says.

    Raises:
        UsageError: it is none that we write.
    """
    if path.suffix not in FORMATS:
        raise UsageError(f"--out {path}: a figure is {' or '.join(FORMATS)}")
    content = io.BytesIO()
    with matplotlib.rc_context(PRINT):
        figure.savefig(content, format=path.suffix[1:], metadata=FORMATS[path.suffix])
    return content.getvalue()


def curve_of_means(block: Block, wishes: Wishes, width: float) -> Figure:
    """Mean score over the tasks seen so far, after every task; bands are standard deviations."""
    rows = wishes.chosen(block)
    T = len(block.task_names)
    x = np.arange(1, T + 1)
    with matplotlib.rc_context(PRINT):
        figure = _figure(width, _height(rows, width))
        axes = figure.add_subplot()
        for place, row in enumerate(rows):
            seen = 100 * np.stack([[R[i, :i].mean() for i in x] for R in row.matrices])
            style = _style(row, place)
            style["marker"] = style["marker"] if T <= 20 else ("." if T == 1 else "")
            mean = seen.mean(0)
            axes.plot(x, mean, label=wishes.name(row.label, row.label), ms=3, lw=1.1, **style)
            if row.n > 1:
                std = seen.std(0, ddof=1)
                band: Any = {"alpha": 0.13, "color": style["color"], "lw": 0}
                axes.fill_between(x, mean - std, mean + std, **band)
        axes.set_xlim(min(0.8, 1 - 0.02 * T), T + max(0.2, 0.02 * T))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        axes.set_xlabel("tasks learned")
        axes.set_ylabel("mean score of tasks seen (%)")
        _finish(figure, axes, rows)
    return figure


def scores(block: Block, wishes: Wishes, width: float) -> Figure:
    """One metric, a line per row: a dot per seed, and mean with standard deviation."""
    metric = wishes.columns[0] if wishes.columns else "acc"
    rows = wishes.chosen(block)
    if metric not in block.shown():
        raise UsageError(f"--columns {metric}: choose of {', '.join(block.shown())}")
    title, better = METRICS[metric]
    with matplotlib.rc_context(PRINT):
        figure = _figure(width, 0.7 + 1.15 * LINE * max(len(rows), 3))
        axes = figure.add_subplot()
        for place, row in enumerate(rows):
            values = 100 * row.values[metric]
            colour = BOUND if row.bound else PALETTE[0]
            axes.plot(values, np.full(row.n, place), "o", ms=3, mfc="none", color=colour, alpha=0.6)
            std = 0.0 if math.isnan(row.std(metric)) else 100 * row.std(metric)
            axes.errorbar(values.mean(), place, xerr=std, fmt="D", ms=3.5, lw=1.1, color=colour)
        axes.set_yticks(range(len(rows)), [wishes.name(r.label, r.label) for r in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=max(2, int(width))))
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        side = "more is better" if better > 0 else "less is better"
        axes.set_xlabel(f"{wishes.name(metric, title)} (%, {side})")
    return figure


def against_cost(block: Block, wishes: Wishes, width: float) -> Figure:
    """ACC over a cost; the stairs are what no other row beats in both."""
    cost = wishes.columns[0] if wishes.columns else "wall_seconds"
    if cost not in COSTS:
        raise UsageError(f"--columns {cost}: name a cost, of {', '.join(COSTS)}")
    rows = [r for r in wishes.chosen(block) if not math.isnan(r.cost(cost))]
    if not rows:
        raise UsageError(f"--columns {cost}: no run of {block.title} has it")
    with matplotlib.rc_context(PRINT):
        figure = _figure(width, _height(rows, width))
        axes = figure.add_subplot()
        for place, row in enumerate(rows):
            style = {k: v for k, v in _style(row, place).items() if k != "linestyle"}
            label = wishes.name(row.label, row.label)
            std = None if math.isnan(row.std("acc")) else 100 * row.std("acc")
            point = (row.cost(cost), 100 * row.mean("acc"))
            axes.errorbar(*point, yerr=std, label=label, ls="", ms=4, lw=0.8, **style)
        points = [(r.cost(cost), 100 * r.mean("acc")) for r in rows]
        front = pareto(points)
        axes.step(*zip(*(points[k] for k in front), strict=True), where="post", c="#999999", lw=0.8)
        costs = [p[0] for p in points]
        if min(costs) > 0 and max(costs) > 20 * min(costs):
            axes.set_xscale("log")
        elif max(costs) > 20 * max(1.0, min(costs)):  # nothing is a cost, too
            least = max(1.0, min(c for c in costs if c > 0))
            axes.set_xscale("symlog", linthresh=least)
            last = math.floor(math.log10(max(costs)))
            powers = range(min(math.ceil(math.log10(least)), last), last + 1)
            axes.set_xticks([0.0, *(10.0**k for k in powers)])
        else:
            axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
        if axes.get_xscale() != "linear":  # its own formatters write powers as mathematics
            axes.xaxis.set_major_formatter(EngFormatter())
            axes.xaxis.set_minor_formatter(NullFormatter())
        unit = " (s)" if cost.endswith("seconds") else " (bytes)" if cost.endswith("bytes") else ""
        axes.set_xlabel(f"{wishes.name(cost, COSTS[cost])}{unit}")
        axes.set_ylabel("ACC (%)")
        _finish(figure, axes, rows)
    return figure


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Of (cost, gain): those that none beats in both, by cost; of equal points the first."""
    front: list[int] = []
    for k in sorted(range(len(points)), key=lambda k: (points[k][0], -points[k][1])):
        if not front or points[k][1] > points[front[-1]][1]:
            front.append(k)
    return front


def matrix(block: Block, wishes: Wishes, width: float) -> Figure:
    """The accuracy matrix of one row, mean over seeds."""
    rows = wishes.chosen(block)
    if len(rows) != 1:
        raise UsageError(f"--rows: a matrix is of one row, of {', '.join(r.label for r in rows)}")
    title = wishes.name(rows[0].label, rows[0].label)
    figure = accuracy_matrix_figure(rows[0].matrices.mean(0), block.task_names, title)
    old, height = figure.get_size_inches()
    if width > old:
        figure.set_size_inches(width, height)
    return figure


KINDS = {"curve": curve_of_means, "scores": scores, "cost": against_cost, "matrix": matrix}
"""What a figure may be, by the word of the command line."""


def _style(row: Row, place: int) -> dict[str, Any]:
    return {
        "color": BOUND if row.bound else PALETTE[place % len(PALETTE)],
        "linestyle": DASHES[place // len(PALETTE) % len(DASHES)],
        "marker": BOUNDS.get(row.bound or "", MARKERS[place % len(MARKERS)]),
    }


def _height(rows: Sequence[Row], width: float) -> float:
    return max(0.55 * width, 0.45 + LINE * len(rows))


def _finish(figure: Figure, axes: Axes, rows: Sequence[Row]) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    if len(rows) > 1:
        figure.legend(loc="outside right upper", frameon=False, handlelength=3.2)
    elif rows:
        axes.set_title(axes.get_legend_handles_labels()[1][0])
