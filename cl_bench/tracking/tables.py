"""The tables that follow from a run's events: the accuracy matrix and the numbers per layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cl_bench.metrics import (
    ANSWERED,
    TASK_AWARE,
    Evidence,
    Matrix,
    empty_matrix,
    so_far,
    summarise,
    summarise_further,
    tasks_learned,
    utility_after,
)
from cl_bench.tracking.files import to_cell, to_csv

Event = Mapping[str, Any]


class Tables:
    """The tables of events that are entered one by one, while a run goes or afterwards.

    Args:
        task_names: columns of the accuracy matrix.

    Attributes:
        matrix: R so far, (T + 1, T), NaN where nothing was evaluated.
        task_aware: R with the task id known; all NaN where the stream has no such score
            beside the other.
        last_row: of the matrix; -1 where there is none yet.
        layers: one mapping per task and layer.
        confusion: by row of the matrix, (T, T): the share of a task's samples (rows) whose answer
            is a class of another (columns); NaN where that is not told.
        curves: evaluations inside of each task: steps, and scores on the tasks up to it.
        general: by tasks learned, scores on tasks that the stream does not teach.
        requests: events ``forget``, in order.
    """

    def __init__(self, task_names: Sequence[str]) -> None:
        self.task_names = list(task_names)
        self.matrix: Matrix = empty_matrix(len(self.task_names))
        self.task_aware: Matrix = empty_matrix(len(self.task_names))
        self.last_row = -1
        self.layers: list[dict[str, Any]] = []
        self.confusion: dict[int, Matrix] = {}
        self.curves: list[list[tuple[int, Matrix]]] = [[] for _ in self.task_names]
        self.general: dict[int, dict[str, float | None]] = {}
        self.requests: list[Event] = []

    def take(self, event: Event) -> None:
        """Enter an event as a reader gets it."""
        if event["event"] == "evaluation":
            row = event["row"]
            self.last_row = max(self.last_row, row)
            for name, score in event["scores"].items():
                column = self.task_names.index(name)
                self.matrix[row, column] = np.nan if score is None else score
            for name, measures in (event.get("details") or {}).items():
                column = self.task_names.index(name)
                score = measures.get(TASK_AWARE)
                if score is not None:
                    self.task_aware[row, column] = score
                for other in range(len(self.task_names)):
                    share = measures.get(f"{ANSWERED}{other}")
                    if share is not None:
                        blank = np.full((len(self.task_names),) * 2, np.nan)
                        self.confusion.setdefault(row, blank)[column, other] = share
        elif event["event"] == "probe" and event["probe"] == "curve":
            self._take_curve(event)
        elif event["event"] == "probe" and event["probe"] == "general" and "row" in event:
            self.general[event["row"]] = dict(event["values"])
        elif event["event"] == "forget":
            self.requests.append(event)
        elif event["event"] == "layers":
            for layer, values in event["layers"].items():
                self.layers.append({"task": event["task"], "layer": layer, **values})

    def _take_curve(self, event: Event) -> None:
        task, step = event["task"], event.get("step")
        scores = [event["values"].get(name) for name in self.task_names[: task + 1]]
        if task >= len(self.task_names) or not isinstance(step, int) or not all(map(_real, scores)):
            return  # a probe of another kind of that name; nothing of ours
        values = np.array([np.nan if s is None else s for s in scores], dtype=np.float64)
        self.curves[task].append((step, values))

    def incremental(self, data: Mapping[str, Any]) -> dict[str, float]:
        """Summaries that depend on more than the matrix, of the tasks learned so far.

        Class-incremental runs have accuracies by task and by sample and the recency bias; what was
        evaluated inside of tasks has min-ACC, WC-ACC and the stability gap.

        Args:
            data: of the run, as ``data.json`` has it.
        """
        done, R = tasks_learned(self.matrix), so_far(self.matrix)
        if done == 0:
            return {}
        samples = _test_samples(data)[:done]
        by_class = data.get("scenario") == "class" and len(samples) == done
        curves = self.curves[:done]
        return summarise_further(
            Evidence(
                R,
                samples if by_class else None,
                self.last_confusion if by_class else None,
                curves if done > 1 and all(curves[1:]) else None,
                [(e["scores"], e["forgotten"]) for e in self.requests] or None,
            )
        )

    def requests_summary(self) -> dict[str, list[float]]:
        """``utility_after_requests``, from 0 requests on; nothing where there are none."""
        found = utility_after([event["scores"] for event in self.requests])
        return {"utility_after_requests": found} if found else {}

    @property
    def last_confusion(self) -> Matrix | None:
        """How the t tasks learned so far are taken for one another, (t, t); None if not told."""
        done = tasks_learned(self.matrix)
        last = self.confusion.get(done)
        return None if last is None else last[:done, :done]

    def matrix_csv(self) -> bytes:
        """The accuracy matrix as ``accuracy_matrix.csv`` holds it."""
        rows = ([i, *map(to_cell, self.matrix[i])] for i in range(self.last_row + 1))
        return to_csv(["after_task", *self.task_names], rows)

    def general_csv(self) -> bytes:
        """The second matrix as ``general.csv`` holds it: a row per number of tasks learned."""
        names = list(dict.fromkeys(name for row in self.general.values() for name in row))
        rows = ([i, *(to_cell(row.get(n)) for n in names)] for i, row in self.general.items())
        return to_csv(["after_task", *names], rows)

    def general_summary(self) -> dict[str, Any]:
        """``general``: {name: {start, end, change}}; nothing where it was not measured."""
        return {"general": general_changes(self.general)} if self.general else {}

    def layers_csv(self) -> bytes:
        """The numbers per task and layer as ``layers.csv`` holds them."""
        columns = list(dict.fromkeys(key for line in self.layers for key in line))
        rows = ([to_cell(line.get(c)) for c in columns] for line in self.layers)
        return to_csv(columns, rows)


def general_changes(rows: Mapping[int, Mapping[str, float | None]]) -> dict[str, dict[str, Any]]:
    """Of every general task the first score, the last, and what became of it in between.

    Tasks have metrics of their own, so no mean over them is made.
    """
    first, last = rows[min(rows)], rows[max(rows)]
    found = {}
    for name, start in first.items():
        end = last.get(name)
        change = None if start is None or end is None else end - start
        found[name] = {"start": start, "end": end, "change": change}
    return found


def task_aware_summary(R: Matrix) -> dict[str, float]:
    """The summaries under ``task_aware_...``; none where nothing was scored with the task id."""
    if not np.isfinite(R).any():
        return {}
    return {f"task_aware_{name}": value for name, value in summarise(R).items()}


def metrics_of(data: Mapping[str, Any], tasks: int) -> list[str]:
    """Of every task, as ``data.json`` has them; accuracy where it is not told."""
    told = data.get("tasks")
    named = [t.get("metric") if isinstance(t, Mapping) else None for t in told or ()]
    found = [metric if isinstance(metric, str) else "accuracy" for metric in named]
    return found if len(found) == tasks else ["accuracy"] * tasks


def _real(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _test_samples(data: Mapping[str, Any]) -> list[int]:
    """Of each task, as ``data.json`` has them; none where one is not told, as by older versions."""
    tasks = data.get("tasks")
    told = [t.get("test_samples") if isinstance(t, Mapping) else None for t in tasks or ()]
    counts = [n for n in told if type(n) is int and n > 0]
    return counts if len(counts) == len(told) else []
