"""Figures of one run: the accuracy matrix, and what was forgotten when."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cl_bench.metrics import Matrix, diagonal, forgetting_per_task, so_far, summarise
from cl_bench.tracking import Run, read_run, write_atomically

DPI = 150

STYLE: Any = {
    "text.parse_math": False,  # a task may have any name
    "font.family": "sans-serif",
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": "#444444",
    "axes.edgecolor": "#999999",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "grid.color": "#e6e6e6",
}

HEAT = matplotlib.colormaps["viridis"]
"""For scores in [0, 1]: perceptually uniform, also for the colour-blind."""

MOST, NUMBERED = 30, 20
"""Tasks that a figure names one by one, of more some at equal distances; and whose cells it fills
with numbers.
"""

LARGEST = 9.0
"""Inches of a side, however many tasks there are."""

EMPTY, HATCH = "#f7f7f7", "#dddddd"


def cell_colours(score: float) -> tuple[str, str]:
    """Background and text colour, as ``#rrggbb``, of a score in [0, 1]."""
    return to_hex(HEAT(score)), "#ffffff" if score < 0.5 else "#000000"


def accuracy_matrix_figure(R: Matrix, task_names: Sequence[str], title: str = "") -> Figure:
    """R as a heatmap in percent; the outlined cells are tasks right after they were learned.

    Args:
        R: accuracy matrix (T + 1, T), scores in [0, 1]; NaN cells are hatched.
        task_names: its columns.
        title: what run it is.
    """
    T = len(task_names)
    cell = _cell_size(T)
    with matplotlib.rc_context(STYLE):
        width = max(4.6, cell * T + 3.0, min(_room(title), LARGEST))
        figure = _figure(width, max(3.4, 0.75 * cell * (T + 1) + 2.0))
        axes = figure.add_subplot()
        under: Any = {"facecolor": EMPTY, "edgecolor": HATCH, "hatch": "////", "lw": 0}
        axes.add_patch(Rectangle((-0.5, -0.5), T, T + 1, zorder=-1, **under))
        image = axes.imshow(np.ma.masked_invalid(R), cmap=HEAT, vmin=0, vmax=1, aspect="auto")
        size = 8.5 if T <= 12 else 7.0
        for i, j in np.argwhere(np.isfinite(R)) if T <= NUMBERED else ():
            learned = j < i
            axes.text(
                j,
                i,
                f"{100 * R[i, j]:.{1 if T <= 12 else 0}f}",
                ha="center",
                va="center",
                fontsize=size,
                fontweight="bold" if j == i - 1 else "normal",
                color=cell_colours(R[i, j])[1],
                alpha=1.0 if learned else 0.65,
            )
        outline: Any = {"fill": False, "edgecolor": "black", "lw": 1.6, "clip_on": False}
        for j in np.flatnonzero(np.isfinite(diagonal(R))) if T <= MOST else ():
            axes.add_patch(Rectangle((j - 0.5, j + 0.5), 1, 1, **outline))
        shown = _named(T)
        names = [task_names[j] for j in shown]
        axes.set_xticks(shown, names)
        _tilt_if_crowded(axes, names, (figure.get_figwidth() - 2.3) / max(len(shown), 1))
        after = [j + 1 for j in shown if T <= MOST or j > T // MOST]
        axes.set_yticks([0, *after], ["before training", *(f"after task {i}" for i in after)])
        hatched = "" if np.isfinite(R).all() else "  (hatched: not evaluated)"
        axes.set_xlabel(f"evaluated on{hatched}")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=30, ticks=np.linspace(0, 1, 6))
        bar.ax.set_yticklabels([f"{p} %" for p in range(0, 101, 20)])
        bar.ax.tick_params(length=0)
        bar.outline.set_visible(False)
        _titles(axes, "Accuracy (%)", title)
    return figure


def forgetting_figure(R: Matrix, task_names: Sequence[str], title: str = "") -> Figure:
    """Left, each task's score from when it was learned; right, how much of its best was lost.

    Args:
        R: accuracy matrix (T + 1, T), scores in [0, 1].
        task_names: its columns.
        title: what run it is.
    """
    done = so_far(R)
    T = done.shape[1]
    names = list(task_names[:T])
    colours = _task_colours(T)
    with matplotlib.rc_context(STYLE):
        figure = _figure(11.0, max(4.2, 0.24 * min(T, MOST) + 1.6))
        left, right = figure.subplots(1, 2, width_ratios=[1.5, 1.0])

        mean = [100 * done[i, :i].mean() for i in range(1, T + 1)]
        for j, colour in enumerate(colours):
            learned = range(j + 1, T + 1)
            left.plot(learned, 100 * done[j + 1 :, j], color=colour, lw=1.6, alpha=0.9)
            left.plot(j + 1, 100 * done[j + 1, j], "o", color=colour, ms=5)
        dashes = (0, (4, 1.5))
        left.plot(range(1, T + 1), mean, c="black", lw=2.4, ls=dashes, label="mean over seen")
        left.set_xlim(0.7, T + 0.3)
        left.set_xticks([j + 1 for j in _named(T, 20 if T <= 20 else 10)])
        lowest = min([100.0, *(100 * np.nanmin(done[j + 1 :, j]) for j in range(T))])
        left.set_ylim(max(0.0, 10 * np.floor((lowest - 5) / 10)), 101)
        left.set_xlabel("tasks learned")
        left.set_ylabel("accuracy (%)")
        left.grid(axis="y")
        if T:
            left.legend(frameon=False, loc="best")
        _titles(left, "Each task after it was learned (dot)", title)

        lost = 100 * forgetting_per_task(done) if T > 1 else np.array([])
        right.barh(range(len(lost)), lost, color=colours[: len(lost)], height=0.72)
        right.axvline(0, color="#999999", lw=0.8)
        marked = _named(len(lost))
        right.set_yticks(marked, [names[j] for j in marked])
        right.invert_yaxis()
        right.tick_params(axis="y", length=0)
        right.grid(axis="x")
        right.set_axisbelow(True)
        right.set_xlabel("best minus final accuracy (points)")
        finite = lost[np.isfinite(lost)]
        right.set_xlim(1.15 * finite.min(initial=0.0), 1.15 * finite.max(initial=5.0))
        for position in np.flatnonzero(np.isfinite(lost)) if len(lost) <= MOST else ():
            value = lost[position]
            right.annotate(
                f"{value:.1f}",
                (max(value, 0.0), position),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                color="#444444",
            )
        if not len(lost):
            middle = {"ha": "center", "va": "center", "transform": right.transAxes}
            right.text(0.5, 0.5, "no old task yet", **middle)
        average = summarise(done)["forgetting"]
        mean_lost = "" if np.isnan(average) else f", mean {100 * average:.1f}"
        _titles(right, f"Forgotten after {T} task{'s' if T != 1 else ''}{mean_lost}", "")
    return figure


def confusion_figure(C: Matrix, task_names: Sequence[str], title: str = "") -> Figure:
    """How tasks are taken for one another, as a heatmap in percent.

    Args:
        C: (T, T), share of the samples of a task (row) whose answer is a class of another (column).
        task_names: of the tasks.
        title: what run it is.
    """
    T = len(C)
    cell = _cell_size(T)
    with matplotlib.rc_context(STYLE):
        width = max(4.6, cell * T + 3.0, min(_room(title), LARGEST))
        figure = _figure(width, max(3.4, 0.75 * cell * T + 2.0))
        axes = figure.add_subplot()
        axes.imshow(np.ma.masked_invalid(C), cmap=HEAT, vmin=0, vmax=1, aspect="auto")
        for i, j in np.argwhere(np.isfinite(C)) if T <= NUMBERED else ():
            text = f"{100 * C[i, j]:.0f}"
            colour = cell_colours(C[i, j])[1]
            axes.text(j, i, text, ha="center", va="center", fontsize=8.0, color=colour)
        shown = _named(T)
        names = [task_names[j] for j in shown]
        axes.set_xticks(shown, names)
        _tilt_if_crowded(axes, names, (figure.get_figwidth() - 2.3) / max(len(shown), 1))
        axes.set_yticks(shown, names)
        axes.set_xlabel("taken for")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        _titles(axes, "Confusion by task (%)", title)
    return figure


def write_figures(directory: Path | str) -> list[Path]:
    """Draw ``accuracy_matrix.png`` and ``forgetting.png`` from a run's files alone.

    A run that says how tasks are taken for one another has ``confusion_by_task.png`` too.

    Returns:
        The files.

    Raises:
        UsageError: the directory holds no run, or the pictures cannot be written.
    """
    run = read_run(directory)
    figures = {
        "accuracy_matrix.png": accuracy_matrix_figure(run.matrix, run.task_names, _caption(run)),
        "forgetting.png": forgetting_figure(run.matrix, run.task_names, _caption(run)),
    }
    if run.confusion is not None and len(run.confusion):
        figures["confusion_by_task.png"] = confusion_figure(
            run.confusion, run.task_names, _caption(run)
        )
    paths = []
    for name, figure in figures.items():
        picture = io.BytesIO()
        figure.savefig(picture, dpi=DPI)
        paths.append(run.directory / name)
        write_atomically(paths[-1], picture.getvalue())
    return paths


def _caption(run: Run) -> str:
    known = "task id known at test" if run.task_id_known else "task id unknown at test"
    return f"{run.title} · {known}" + ("" if run.status == "completed" else f" · {run.status}")


def _figure(width: float, height: float) -> Figure:
    """A figure that pyplot knows nothing of, so nothing has to be closed."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


BESIDE, LETTER = 1.5, 0.068
"""Inches beside a caption, and of a letter of its font."""


def _room(caption: str) -> float:
    """Inches that a figure must be wide so that its caption stands in one line."""
    return BESIDE + LETTER * len(caption)


def _titles(axes: Axes, headline: str, subtitle: str) -> None:
    lines = textwrap.wrap(subtitle, int((LARGEST - BESIDE) / LETTER)) or [""]
    axes.set_title(headline, pad=22 + 12 * (len(lines) - 1))
    axes.annotate(
        "\n".join(lines),
        (0, 1),
        (0, 7),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=9,
        color="#666666",
    )


def _cell_size(tasks: int) -> float:
    """Inches of a heatmap's cell."""
    return 0.55 if tasks <= 12 else min(0.42, LARGEST / tasks)


def _named(tasks: int, most: int = MOST) -> list[int]:
    """Which tasks of many a figure names: all, or some at equal distances, the last one too."""
    stride = -(-tasks // most) if tasks else 1
    return list(range(tasks - 1, -1, -stride))[::-1]


def _tilt_if_crowded(axes: Axes, names: Sequence[str], cell: float) -> None:
    # A character of the tick font is about 0.085 inches wide.
    if max(map(len, names)) * 0.085 > cell:
        axes.tick_params(axis="x", rotation=45)
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("right")
            label.set_rotation_mode("anchor")


def _task_colours(tasks: int) -> list[tuple[float, float, float, float]]:
    """Early tasks dark, late ones light; not the last tenth of the map, too pale on white."""
    scale: Colormap = matplotlib.colormaps["plasma"]
    return [scale(0.88 * t / max(tasks - 1, 1)) for t in range(tasks)]
