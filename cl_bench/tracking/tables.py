"""The tables that follow from a run's events: the accuracy matrix and the numbers per layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cl_bench.metrics import TASK_AWARE, Matrix, empty_matrix, summarise
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
    """

    def __init__(self, task_names: Sequence[str]) -> None:
        self.task_names = list(task_names)
        self.matrix: Matrix = empty_matrix(len(self.task_names))
        self.task_aware: Matrix = empty_matrix(len(self.task_names))
        self.last_row = -1
        self.layers: list[dict[str, Any]] = []

    def take(self, event: Event) -> None:
        """Enter an event as a reader gets it."""
        if event["event"] == "evaluation":
            row = event["row"]
            self.last_row = max(self.last_row, row)
            for name, score in event["scores"].items():
                column = self.task_names.index(name)
                self.matrix[row, column] = np.nan if score is None else score
            for name, measures in (event.get("details") or {}).items():
                score = measures.get(TASK_AWARE)
                if score is not None:
                    self.task_aware[row, self.task_names.index(name)] = score
        elif event["event"] == "layers":
            for layer, values in event["layers"].items():
                self.layers.append({"task": event["task"], "layer": layer, **values})

    def matrix_csv(self) -> bytes:
        """The accuracy matrix as ``accuracy_matrix.csv`` holds it."""
        rows = ([i, *map(to_cell, self.matrix[i])] for i in range(self.last_row + 1))
        return to_csv(["after_task", *self.task_names], rows)

    def layers_csv(self) -> bytes:
        """The numbers per task and layer as ``layers.csv`` holds them."""
        columns = list(dict.fromkeys(key for line in self.layers for key in line))
        rows = ([to_cell(line.get(c)) for c in columns] for line in self.layers)
        return to_csv(columns, rows)


def task_aware_summary(R: Matrix) -> dict[str, float]:
    """The summaries under ``task_aware_...``; none where nothing was scored with the task id."""
    if not np.isfinite(R).any():
        return {}
    return {f"task_aware_{name}": value for name, value in summarise(R).items()}
