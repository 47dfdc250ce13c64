"""What a run has left in its directory."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cl_bench.contracts import UsageError
from cl_bench.metrics import TASK_AWARE, Matrix, empty_matrix
from cl_bench.tracking.files import CONFIG, LOCK, MATRIX, RESULTS, read_text

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """What a report needs of a run, read from its directory.

    Attributes:
        directory: where it was read.
        task_names: columns of R.
        matrix: R, (T + 1, T), NaN where nothing was evaluated.
        task_id_known: whether the task id was known at test time.
        status: ``completed``, ``failed``, ``interrupted``, or ``unfinished`` if nobody wrote how
            it ended: it is still running, or was killed.
        facts: stream, strategy, seed and whatever else the run was opened with.
        task_aware: R with the task id known, of class-incremental runs; else all NaN.
    """

    directory: Path
    task_names: list[str]
    matrix: Matrix
    task_id_known: bool
    status: str
    facts: dict[str, Any]
    task_aware: Matrix

    @property
    def title(self) -> str:
        """Stream, strategy and seed, as far as they are known."""
        named = [str(self.facts[k]) for k in ("stream", "strategy") if k in self.facts]
        seed = [f"seed {self.facts['seed']}"] if "seed" in self.facts else []
        return " · ".join(named + seed) or self.directory.name


def read_results(directory: Path | str) -> list[dict[str, Any]]:
    """The events of a run, in order; half a last line, as a kill leaves it, is left out.

    Raises:
        UsageError: there is no such file, or a line before the last is not JSON.
    """
    path = Path(directory) / RESULTS
    lines = read_text(path).split("\n")
    events = []
    # What follows the last newline was never completed.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UsageError(
                f"{path}, line {number}: not JSON ({error}); restore the file or delete that line"
            ) from None
    return events


def read_matrix(directory: Path | str) -> tuple[list[str], Matrix]:
    """Task names and R, (T + 1, T), of a run; rows that were not reached are NaN.

    Raises:
        UsageError: the run has no matrix yet, or the file is damaged.
    """
    path = Path(directory) / MATRIX
    header, *rows = csv.reader(io.StringIO(read_text(path), newline=""))
    names = header[1:]
    matrix = empty_matrix(len(names))
    try:
        for learned, *cells in rows:
            for j, cell in zip(range(len(names)), cells, strict=True):
                matrix[int(learned), j] = float(cell) if cell else np.nan
    except (ValueError, IndexError) as error:
        raise UsageError(
            f"{path} is not an accuracy matrix of {len(names)} tasks ({error})"
        ) from None
    return names, matrix


def read_run(directory: Path | str) -> Run:
    """Everything a report shows, from the directory alone.

    Raises:
        UsageError: the directory holds no run, or one that was never evaluated.
    """
    names, matrix = read_matrix(directory)
    events = read_results(directory)
    task_aware = empty_matrix(len(names))
    for event in events:
        if event["event"] == "evaluation":
            enter_task_aware(task_aware, names, event)
    statuses = [e for e in events if e["event"] == "status"]
    facts = {k: v for k, v in statuses[0].items() if k not in ("event", "time", "status")}
    ended = statuses[-1]["status"]
    return Run(
        directory=Path(directory),
        task_names=names,
        matrix=matrix,
        task_id_known=bool(facts.pop("task_id_known")),
        status="unfinished" if ended == "started" else ended,
        facts=facts,
        task_aware=task_aware,
    )


def enter_task_aware(R: Matrix, task_names: Sequence[str], event: Event) -> None:
    """Enter an evaluation's scores with the task id known, if it has any, into R in place."""
    for name, measures in event.get("details", {}).items():
        score = measures.get(TASK_AWARE)
        if score is not None:
            R[event["row"], task_names.index(name)] = score


def is_finished(directory: Path | str) -> bool:
    """Whether a run is completed, and its process has left nothing undone (such as figures)."""
    path = Path(directory)
    if (path / LOCK).exists() or not (path / RESULTS).exists():
        return False
    statuses = [e["status"] for e in read_results(path) if e["event"] == "status"]
    return statuses[-1:] == ["completed"]


def require_run(path: Path, data: Mapping[str, Any]) -> None:
    """Make sure that a directory holds a run on this data.

    Raises:
        UsageError: it holds none, or one that began with another fingerprint of the data.
    """
    if not (path / CONFIG).exists():
        raise UsageError(f"{path} holds no run ({CONFIG} is missing): give the directory of a run")
    written = json.loads(read_text(path / "data.json"))
    then, now = written.get("fingerprint"), data.get("fingerprint")
    if then != now:
        raise UsageError(
            f"the data of {path} has changed (fingerprint {then}, now {now}): a run is resumed on "
            "the data it began with"
        )
