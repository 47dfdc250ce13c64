"""Runs against each other: old accuracy over new accuracy, and old accuracy at equal new accuracy.

``python -m cl_bench.report.tradeoff runs/.../a runs/.../b --level 0.98 --out tradeoff.png``

A strategy that learns less of the new task also forgets less, so comparisons of old accuracy alone
flatter it. Every run gives its path through (new, old) while the last task is learned, as far as it
was evaluated densely (``eval.dense``), and its end; runs of one strategy that differ in a setting,
such as ``strategy.alpha``, make a trade-off curve of their ends.
"""

import argparse
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cl_bench.contracts import UsageError
from cl_bench.errors import printable
from cl_bench.metrics import matched
from cl_bench.report.plots import DPI, STYLE, _figure, _titles
from cl_bench.tracking import read_results, read_run, write_atomically


@dataclass(frozen=True)
class Passage:
    """How a run went through the plane of old and new accuracy while its last task was learned.

    Attributes:
        label: what the run is called.
        where: the last part of its directory.
        steps: of the last task, at which was evaluated.
        old: mean score of all earlier tasks, in [0, 1].
        new: score of the last task.
        end: old and new score in the run's last row.
    """

    label: str
    where: str
    steps: list[int]
    old: list[float]
    new: list[float]
    end: tuple[float, float]


def read_path(directory: Path | str) -> Passage:
    """Read a run's path.

    Raises:
        UsageError: the directory holds no run of at least two tasks that has ended.
    """
    run = read_run(directory)
    last = len(run.task_names) - 1
    row = run.matrix[-1]
    if last < 1 or not np.isfinite(row).all():
        raise UsageError(
            f"{directory}: a trade-off needs a completed run of at least two tasks, this one is "
            f"{run.status} with {last + 1} task(s)"
        )
    curve = [
        event
        for event in read_results(directory)
        if event["event"] == "probe" and event["probe"] == "curve" and event["task"] == last
    ]
    old_names = run.task_names[:last]
    return Passage(
        label=run.title,
        where=run.directory.name,
        steps=[event["step"] for event in curve],
        old=[float(np.mean([event["values"][n] for n in old_names])) for event in curve],
        new=[float(event["values"][run.task_names[last]]) for event in curve],
        end=(float(row[:last].mean()), float(row[last])),
    )


def tradeoff_figure(paths: Sequence[Passage], level: float | None = None) -> Figure:
    """Old over new accuracy: lines are ways through training, dots are ends of runs."""
    with matplotlib.rc_context(STYLE):
        figure = _figure(7.6, 5.2)
        axes = figure.add_subplot()
        groups = list(dict.fromkeys(_group(path) for path in paths))
        colours = matplotlib.colormaps["tab10"]
        for number, group in enumerate(groups):
            members = [path for path in paths if _group(path) == group]
            colour = colours(number % 10)
            for path in members:
                if path.steps:
                    new, old = 100 * np.array(path.new), 100 * np.array(path.old)
                    axes.plot(new, old, "-", lw=1.0, alpha=0.5, color=colour)
            ends = sorted((100 * path.end[1], 100 * path.end[0]) for path in members)
            xs, ys = zip(*ends, strict=True)
            axes.plot(xs, ys, "o", ms=7, mec="white", color=colour, label=group)
        if level is not None:
            axes.axvline(100 * level, color="#999999", lw=0.9, ls=(0, (4, 2)))
        axes.set_xlim(-3, 103)
        axes.set_ylim(-3, 103)
        axes.grid()
        axes.set_axisbelow(True)
        axes.set_xlabel("new task (%)")
        axes.set_ylabel("old tasks, mean (%)")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
        _titles(axes, "Old against new accuracy", "lines: while learning; dots: ends of runs")
    return figure


def matched_table(paths: Sequence[Passage], level: float) -> Table:
    """Old accuracy of every run where it first has the new task at ``level``, and at its end.

    A strategy that edits the weights after the last step is told by its end alone.
    """
    table = Table(box=None, pad_edge=False, title_justify="left")
    table.title = f"old tasks where the new one first reaches {100 * level:g} %, and at the end (%)"
    table.add_column("run", no_wrap=True)
    table.add_column("directory", overflow="fold")
    for name in ("step", "new", "old", "end: new", "old"):
        table.add_column(name, justify="right", no_wrap=True)
    for path in paths:
        at = matched(path.old, path.new, level)
        cells = ["-", "-", "-"]
        if at is not None:
            cells = [str(path.steps[at]), f"{100 * path.new[at]:.1f}", f"{100 * path.old[at]:.1f}"]
        old, new = (f"{100 * score:.1f}" for score in path.end)
        table.add_row(Text(path.label), Text(printable(path.where)), *cells, new, old)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and draw the figure; 2 after an error that the user can put right."""
    parser = argparse.ArgumentParser(
        prog="python -m cl_bench.report.tradeoff", description=__doc__.splitlines()[0]
    )
    parser.add_argument("runs", nargs="+", help="directories of runs")
    parser.add_argument("--level", type=float, default=0.98, help="new accuracy to compare at")
    parser.add_argument("--out", default="tradeoff.png", help="where the figure goes")
    given = parser.parse_args(arguments)
    try:
        if not 0.0 < given.level <= 1.0:
            raise UsageError(f"--level={given.level}: an accuracy in (0, 1], such as 0.98")
        paths = [read_path(run) for run in given.runs]
        picture = io.BytesIO()
        tradeoff_figure(paths, given.level).savefig(picture, dpi=DPI)
        write_atomically(Path(given.out), picture.getvalue())
    except (UsageError, OSError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 2
    Console().print(matched_table(paths, given.level))
    print(f"figure: {given.out}")
    return 0


def _group(path: Passage) -> str:
    """Runs that differ in their seed or a setting alone share a colour."""
    return path.label.split(" · seed")[0]


if __name__ == "__main__":
    raise SystemExit(main())
