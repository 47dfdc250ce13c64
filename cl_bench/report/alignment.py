"""Figures of probes: old tasks while a new one is learned, loss landscapes, and paths of loss."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from cl_bench.report.plots import DPI, STYLE, _caption, _figure, _task_colours, _titles
from cl_bench.tracking import read_results, read_run, write_atomically

Event = Mapping[str, Any]

MOST_PANELS = 6
"""Tasks that the figure of curves shows; of more, these many at equal distances."""

NEW = "#111111"


def curve_figure(events: Sequence[Event], task_names: Sequence[str], title: str = "") -> Figure:
    """Scores of old tasks and the new one over the new task's steps; stars are recovered ones.

    Args:
        events: probe events of a run, in order; its ``curve`` and ``alignment`` ones are drawn.
        task_names: of the stream.
        title: what run it is.
    """
    curves = [e for e in events if e["probe"] == "curve"]
    tasks = sorted({e["task"] for e in curves})
    if len(tasks) > MOST_PANELS:
        tasks = [tasks[i] for i in np.linspace(0, len(tasks) - 1, MOST_PANELS).round().astype(int)]
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    with matplotlib.rc_context(STYLE):
        figure = _figure(max(6.4, 4.6 * columns), 3.4 * rows + 0.6)
        panels = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
        for panel in panels[len(tasks) :]:
            panel.set_visible(False)
        colours = _task_colours(len(task_names))
        for panel, task in zip(panels, tasks, strict=False):
            points = [e for e in curves if e["task"] == task]
            steps = [e["step"] for e in points]
            for old, name in enumerate(task_names[:task]):
                scores = [_percent(e["values"].get(name)) for e in points]
                panel.plot(steps, scores, "-o", ms=3.5, lw=1.8, color=colours[old], label=name)
            new = [_percent(e["values"].get(task_names[task])) for e in points]
            panel.plot(steps, new, "--", lw=1.8, color=NEW, label="the new task")
            _stars(panel, events, task, task_names, colours)
            # The first steps decide: they get as much room as all that follow.
            panel.set_xscale("symlog", linthresh=50, linscale=1.2)
            panel.set_xlim(-1, max(steps) * 1.1)
            last = max(steps)
            near = 0.75 if last <= 100 else 0.4
            marks = [n for n in (0, 10, 20, 40, 100, 200, 400, 1000, 10_000) if n < near * last]
            panel.set_xticks([*marks, last], [f"{n:,}" for n in (*marks, last)])
            panel.minorticks_off()
            panel.set_ylim(-2, 104)
            panel.grid(axis="y")
            panel.set_xlabel(f"steps of {task_names[task]}")
            panel.set_ylabel("score (%)")
            _titles(panel, f"Learning {task_names[task]}", title if panel is panels[0] else "")
        # The last panel has every old task.
        handles, labels = panels[len(tasks) - 1].get_legend_handles_labels()
        figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside right center")
    return figure


def _stars(
    panel: Axes, events: Sequence[Event], task: int, task_names: Sequence[str], colours: Any
) -> None:
    shown = False
    for event in events:
        if event["probe"] != "alignment" or event["task"] != task:
            continue
        for old, name in enumerate(task_names[:task]):
            value = event["values"].get(name, {}).get("recovered")
            if value is None:
                continue
            label = None if shown else "recovered"
            colour = colours[old]
            panel.plot(
                event["step"], 100 * value, "*", ms=12, mec="white", color=colour, label=label
            )
            shown = True


def landscape_figure(event: Event, task_names: Sequence[str], title: str = "") -> Figure:
    """Losses of the task before and of the new one, side by side, on the plane of two phases.

    Args:
        event: a ``landscape`` event of the record.
        task_names: of the stream.
        title: what run it is.
    """
    a, b = np.array(event["along_early"]), np.array(event["along_late"])
    first, last = event["early"]
    with matplotlib.rc_context(STYLE):
        figure = _figure(11.0, 4.6)
        panels = figure.subplots(1, len(event["losses"]), squeeze=False)[0]
        for panel, (name, grid) in zip(panels, event["losses"].items(), strict=True):
            # A loss that is not finite stands as null in the record.
            losses = np.ma.masked_invalid(np.array(grid, dtype=float))
            low = max(float(losses.min()), 1e-4)
            high = max(float(losses.max()), 1.01 * low)
            norm = LogNorm(low, high)
            shown = np.ma.clip(losses, low, None)
            levels = np.geomspace(low, high, 13)
            image = panel.contourf(a, b, shown, levels=levels, norm=norm, cmap="viridis_r")
            panel.contour(a, b, shown, levels=levels, norm=norm, colors="white", linewidths=0.4)
            anchors = {f"step {first}": (0, 0), f"step {last}": (1, 0), "end": (1, 1)}
            xs, ys = zip(*anchors.values(), strict=True)
            panel.plot(xs, ys, "-o", color="black", mfc="white", ms=6, lw=1.4)
            losses_there = event["anchors"][name]
            for (label, place), loss in zip(anchors.items(), losses_there, strict=True):
                panel.annotate(
                    f"{label}: {loss:.3g}",
                    place,
                    (6, 6),
                    textcoords="offset points",
                    fontsize=8,
                    bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.8},
                )
            bar = figure.colorbar(image, ax=panel, pad=0.02, format="%.3g")
            bar.outline.set_visible(False)
            panel.set_xlabel("along the early phase")
            panel.set_ylabel("along the late phase")
            age = "new" if name == task_names[event["task"]] else "old"
            _titles(panel, f"Loss of {name} ({age})", title if panel is panels[0] else "")
        found = event["values"]
        lengths = f"|early| = {found['u_norm']:.3g}, |late| = {found['v_norm']:.3g}"
        cosine = "" if found["cosine"] is None else f", cosine {found['cosine']:.2f}"
        figure.supxlabel(
            f"{lengths}{cosine}: axes are neither of one length nor orthogonal",
            fontsize=8.5,
            color="#666666",
        )
    return figure


def connectivity_figure(
    events: Sequence[Event], task_names: Sequence[str], title: str = ""
) -> Figure:
    """Loss of each task on the straight lines between the weights after two tasks, a panel a line.

    Args:
        events: probe events of a run; its ``connectivity`` ones are drawn.
        task_names: of the stream.
        title: what run it is.
    """
    events = [e for e in events if e["probe"] == "connectivity"]
    lines = [(name, e) for e in events for name in e["losses"]]
    if len(lines) > MOST_PANELS:
        lines = [lines[i] for i in np.linspace(0, len(lines) - 1, MOST_PANELS).round().astype(int)]
    columns = 2 if len(lines) == 4 else min(3, len(lines))
    rows = -(-len(lines) // columns)
    with matplotlib.rc_context(STYLE):
        figure = _figure(max(6.4, 4.2 * columns), 3.2 * rows + 0.6)
        panels = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
        for panel in panels[len(lines) :]:
            panel.set_visible(False)
        colours = _task_colours(len(task_names))
        for panel, (start, event) in zip(panels, lines, strict=False):
            after = task_names[event["task"]]
            for name, losses in event["losses"][start].items():
                newest = name == after
                colour = NEW if newest else colours[task_names.index(name)]
                label = "the later task" if newest else name
                style = "--" if newest else "-"
                # A loss that is not finite stands as null in the record.
                shown = np.ma.masked_invalid(np.array(losses, dtype=float))
                panel.plot(event["along"], shown, style, lw=1.8, color=colour, label=label)
            panel.set_xlim(0, 1)
            panel.set_xticks([0, 1], [f"after {start}", f"after {after}"])
            for label, side in zip(panel.get_xticklabels(), ("left", "right"), strict=True):
                label.set_horizontalalignment(side)
            panel.set_ylim(bottom=0)
            panel.grid(axis="y")
            panel.set_ylabel("loss")
            found = [v for v in event["values"][start].values() if v is not None]
            rise = f"largest barrier {max(found):.3g}" if found else ""
            _titles(panel, rise, title if panel is panels[0] else "")
        # The last panel has every old task.
        handles, labels = panels[len(lines) - 1].get_legend_handles_labels()
        figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside right center")
    return figure


def write_probe_figures(directory: Path | str) -> list[Path]:
    """Draw what the probes of a run recorded, if there were any, from its files alone.

    ``curve.png``, ``connectivity.png``, and ``landscape_<task>.png`` for every task that has one.

    Returns:
        The files.

    Raises:
        UsageError: the directory holds no run, or the pictures cannot be written.
    """
    run = read_run(directory)
    events = [e for e in read_results(directory) if e["event"] == "probe"]
    figures = {
        f"landscape_{e['task'] + 1}.png": landscape_figure(e, run.task_names, _caption(run))
        for e in events
        if e["probe"] == "landscape"
    }
    if any(e["probe"] == "curve" for e in events):
        figures["curve.png"] = curve_figure(events, run.task_names, _caption(run))
    if any(e["probe"] == "connectivity" and e["losses"] for e in events):
        figures["connectivity.png"] = connectivity_figure(events, run.task_names, _caption(run))
    paths = []
    for name, figure in figures.items():
        picture = io.BytesIO()
        figure.savefig(picture, dpi=DPI)
        paths.append(run.directory / name)
        write_atomically(paths[-1], picture.getvalue())
    return paths


def _percent(score: float | None) -> float:
    return np.nan if score is None else 100 * score
