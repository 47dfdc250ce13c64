"""Tables of one run for the terminal; scores in percent."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cl_bench.errors import printable
from cl_bench.metrics import Matrix, summaries, summarise, tasks_learned
from cl_bench.metrics.mixed import by_metric, is_mixed
from cl_bench.report.plots import cell_colours
from cl_bench.report.quantities import MORE
from cl_bench.tracking import Run, read_run
from cl_bench.tracking.tables import general_changes

WIDTH = 100
"""Columns a table takes at most, however wide the console is."""

LABEL_WIDTH = 16
SHORTEST_LABEL = 9
"""Columns for the name of a task at the start of a row, at most and at least."""


def matrix_table(
    R: Matrix, task_names: Sequence[str], width: int = WIDTH, what: str = "accuracy"
) -> Table:
    """The accuracy matrix in percent, with nothing cut off.

    Learned tasks have a background by score, the diagonal is underlined, and tasks still to come
    are dim. Columns carry task numbers where names do not fit; decimals go where there are many
    tasks, and beyond that only every n-th task is shown.

    Args:
        R: accuracy matrix (T + 1, T), scores in [0, 1].
        task_names: its columns.
        width: columns of the console that it may take; below 25 or so a row no longer fits.
        what: the scores are.
    """
    T = len(task_names)
    number = len(str(T))
    longest = max(9, *map(len, task_names))
    decimals = 1 if number + 2 + min(longest, LABEL_WIDTH) + 6 * T <= width else 0
    cell = 5 if decimals else 3
    # Names at the start of rows give way to columns, down to where they say nothing any more.
    room = width - number - 2 - T * (cell + 1)
    label = min(longest, LABEL_WIDTH, max(room, SHORTEST_LABEL))
    fits = max(1, (width - number - 2 - label) // (cell + 1))
    stride = -(-T // fits)
    # The last task always shows, the others at equal distances before it.
    shown = list(range(T - 1, -1, -stride))[::-1]
    columns = sum(max(len(task_names[j]), cell) + 1 for j in shown)
    named = number + 2 + label + columns <= width

    table = Table(box=None, padding=(0, 0, 0, 1), pad_edge=False, title_justify="left")
    table.title = Text(what if "%" in what else f"{what} (%)", style="bold not italic")
    table.add_column("after task", no_wrap=True)
    for j in shown:
        head = Text(printable(task_names[j]) if named else str(j + 1))
        table.add_column(head, justify="right", no_wrap=True)
    for i in [0, *(j + 1 for j in shown)]:
        if not np.isfinite(R[i]).any():
            continue
        name = task_names[i - 1] if i else "untrained"
        cells = [_cell(R[i, j], learned=j < i, fresh=j == i - 1, decimals=decimals) for j in shown]
        table.add_row(Text(f"{i:{number}} {_shorten(printable(name), label)}"), *cells)
    if stride > 1:
        table.caption = Text(
            f"{len(shown)} of {T} tasks; the others are in accuracy_matrix.csv", style="dim"
        )
        table.caption_justify = "left"
    return table


def summary_table(
    summary: Mapping[str, float],
    task_id_known: bool,
    task_aware: Mapping[str, float] | None = None,
    more: Mapping[str, float] | None = None,
) -> Table:
    """Summaries with what they mean.

    Args:
        summary: as :func:`cl_bench.metrics.summarise` returns it, in [0, 1].
        task_id_known: whether the task id was known at test time.
        task_aware: ``summary`` of scores with the task id known, for a column of its own.
        more: those of :data:`MORE` that the run has.
    """
    known = "known" if task_id_known else "not known"
    both = task_aware is not None
    table = Table(box=None, pad_edge=False, show_header=both, title_justify="left")
    table.title = Text(f"summary (%, task id {known} at test time)", style="bold not italic")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(f"id {known}" if both else "", justify="right", no_wrap=True)
    if both:
        table.add_column("id known", justify="right", no_wrap=True)
    table.add_column(style="dim")
    for key, one in summaries().items():
        columns = [summary] if task_aware is None else [summary, task_aware]
        shown = [_percent(column[key], one.signed) for column in columns]
        table.add_row(one.label, *shown, one.meaning)
    for key, further in MORE.items():
        if more and key in more:
            shown = [_percent(more[key], signed=False), *([""] if both else [])]
            table.add_row(further.label, *shown, further.meaning)
    return table


def _percent(value: float, signed: bool) -> str:
    sign = "+" if signed else ""
    return "-" if np.isnan(value) else f"{100 * value:{sign}.1f}"


def print_run(directory: Path | str, console: Console | None = None) -> None:
    """Print a run's accuracy matrix and summaries, from its files alone.

    Raises:
        UsageError: the directory holds no run.
    """
    run = read_run(directory)
    console = console or Console()
    done, T = tasks_learned(run.matrix), len(run.task_names)
    state = "" if run.status == "completed" else f"  {run.status}, {done} of {T} tasks learned"
    console.print(Text(f"{run.title}{state}", style="bold"))
    kinds = list(dict.fromkeys(run.metrics))
    mixed = is_mixed(run.metrics)
    scored = [f"{n} [{m}]" for n, m in zip(run.task_names, run.metrics, strict=False)]
    title = "scores (%), each task by its own metric" if mixed else kinds[0].replace("_", " ")
    table = matrix_table(
        run.matrix, scored if mixed else run.task_names, min(console.width, WIDTH), title
    )
    console.print(table)
    console.print()
    if mixed:
        console.print(by_metric_table(run.matrix, run.metrics))
        _print_general(run, console)
        return
    told = summarise(run.task_aware) if np.isfinite(run.task_aware).any() else None
    summary = summarise(run.matrix)
    console.print(summary_table(summary, run.task_id_known, told, run.incremental))
    _print_general(run, console)


def _print_general(run: Run, console: Console) -> None:
    if run.general:
        console.print()
        console.print(general_table(run.general, run.task_names))


def by_metric_table(R: Matrix, metrics: Sequence[str]) -> Table:
    """What each metric comes to over the tasks that have it; there is no mean over all."""
    table = Table(box=None, padding=(0, 0, 0, 1), pad_edge=False, title_justify="left")
    table.title = Text("by metric (%)", style="bold not italic")
    for name in ("metric", "tasks", "end", "learned", "change"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for metric, found in by_metric(R, metrics).items():
        numbers = [_percent(found[k], signed=k == "change") for k in ("end", "learned", "change")]
        table.add_row(metric, str(found["tasks"]), *numbers)
    return table


def general_table(
    rows: Mapping[int, Mapping[str, float | None]], task_names: Sequence[str]
) -> Table:
    """What the stream cost in general: a row per number of tasks learned, and the change at last.

    Args:
        rows: scores by tasks learned and general task.
        task_names: of the stream.
    """
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    table = Table(box=None, padding=(0, 0, 0, 1), pad_edge=False, title_justify="left")
    table.title = Text("in general (%)", style="bold not italic")
    table.add_column("after task")
    for name in names:
        table.add_column(Text(printable(name)), justify="right")
    for row, values in rows.items():
        told = task_names[row - 1] if row else "untrained"
        scores = [values.get(name) for name in names]
        cells = ["·" if s is None else f"{100 * s:.1f}" for s in scores]
        table.add_row(Text(f"{row} {_shorten(printable(told), LABEL_WIDTH)}"), *cells)
    changes = [one["change"] for one in general_changes(rows).values()]
    cells = ["·" if c is None else f"{100 * c:+.1f}" for c in changes]
    table.add_row("change", *cells, style="bold")
    return table


def _cell(score: float, learned: bool, fresh: bool, decimals: int) -> Text:
    if np.isnan(score):
        return Text("·", style="dim")
    text = f"{100 * score:.{decimals}f}"
    if not learned:
        return Text(text, style="dim")
    background, foreground = cell_colours(score)
    cell = Text(text.rjust(5 if decimals else 3), style=f"{foreground} on {background}")
    if fresh:
        cell.stylize("bold underline", len(cell) - len(text))
    return cell


def _shorten(name: str, width: int) -> str:
    return name if len(name) <= width else f"{name[: width - 1]}…"
