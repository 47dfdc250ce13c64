"""The record: every number of a run goes through one object to plain files and to loggers.

========================  ======================================================================
``config.yaml``           the resolved configuration
``command.txt``           the command that runs exactly this again
``choices.json``          which option of each configuration group was chosen
``environment.json``      versions, platform, git commit, processes, effective batch
``data.json``             the stream and where its data comes from
``results.jsonl``         what happened, one JSON object a line, on disk as it happens
``accuracy_matrix.csv``   R, one row per number of tasks learned; rewritten after each row
``layers.csv``            numbers per task and layer; rewritten after each task
``general.csv``           a second matrix: scores on tasks that the stream does not teach, if asked
``summary.json``          how the run ended and what it reached
``resumes.jsonl``         when the run was resumed, and from where
``checkpoints``           what a run is resumed from; see :mod:`cl_bench.experiment.checkpoint`
``weights``               of the network after each task; see :mod:`cl_bench.experiment.weights`
``superseded``            what a resumed run no longer stands on; only where there is any
``run.lock``              only while a process writes: which one
========================  ======================================================================

``results.jsonl`` is the truth from which the tables can be rebuilt; its lines are chained
(:mod:`cl_bench.tracking.journal`), and :mod:`cl_bench.tracking.events` says what they tell.
"""

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from cl_bench.contracts import UsageError
from cl_bench.metrics import Matrix, tasks_learned
from cl_bench.metrics.mixed import by_metric, is_mixed, summarise_alike
from cl_bench.tracking.events import Events
from cl_bench.tracking.files import (
    GENERAL,
    LAYERS,
    MATRIX,
    SUMMARY,
    digest,
    to_json,
    write_atomically,
)
from cl_bench.tracking.journal import Journal, Line, now
from cl_bench.tracking.lock import Lock
from cl_bench.tracking.sinks import Sink, Sinks
from cl_bench.tracking.tables import Event, Tables, metrics_of, task_aware_summary

Status = Literal["completed", "failed", "interrupted"]


class Record(Events):
    """What happened in one run, in one directory. A context manager.

    :func:`~cl_bench.tracking.opening.open_record` and ``resume_record`` make one.

    Leaving the ``with`` block writes the summary if :meth:`finish` has not, and after an exception
    it says that the run failed or was interrupted. All methods raise :class:`UsageError` where the
    disk takes no more; what was written before stays readable.

    Attributes:
        directory: where the files are.
        task_names: columns of the accuracy matrix.
        task_id_known: whether every score was reached with the task id known at test time.
    """

    def __init__(
        self,
        lock: Lock,
        lines: list[Line],
        task_names: Sequence[str],
        task_id_known: bool,
        facts: Mapping[str, Any],
        sinks: Sequence[Sink],
        seconds: float = 0.0,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        self.directory = lock.path.parent
        self.task_names = list(task_names)
        self.task_id_known = task_id_known
        self._lock = lock
        self._tables = Tables(task_names)
        self._facts = dict(facts)
        self._data = dict(data or {})
        self._sinks = Sinks(sinks, self.directory)
        self._files: dict[str, str] = {}
        self._finished = False
        self._journal = Journal(self.directory, lines)
        self._sinks.tell(lambda sink: sink.start(self.task_names))
        self._started = time.monotonic() - seconds

    def begin(self, files: Mapping[str, str]) -> None:
        """The first event: the run starts, with ``files`` {name: SHA-256} written before it."""
        self.status("started", task_id_known=self.task_id_known, files=files, **self._facts)

    def go_on(self, events: Sequence[Event]) -> None:
        """Make ``events`` all that happened: journal, tables and sinks are brought there."""
        self._journal.cut()
        for event in events:
            self._tables.take(event)
        for name in (MATRIX, LAYERS, GENERAL, SUMMARY):  # they follow from the events
            (self.directory / name).unlink(missing_ok=True)
        if self._tables.last_row >= 0:
            self._write(MATRIX, self._tables.matrix_csv())
        if self._tables.layers:
            self._write(LAYERS, self._tables.layers_csv())
        if self._tables.general:
            self._write(GENERAL, self._tables.general_csv())
        self._sinks.tell(lambda sink: sink.resume(events))

    @property
    def metrics(self) -> list[str]:
        """Of every task."""
        return metrics_of(self._data, len(self.task_names))

    @property
    def mixed(self) -> bool:
        """Whether tasks are scored in different ways, so that no mean over them is made."""
        return is_mixed(self.metrics)

    @property
    def position(self) -> int:
        """Bytes of ``results.jsonl`` so far."""
        return self._journal.position

    @property
    def chain(self) -> str:
        """The hash of ``results.jsonl`` so far; with :attr:`position`, a checkpoint's place."""
        return self._journal.chain

    @property
    def matrix(self) -> Matrix:
        """R so far, (T + 1, T), NaN where nothing was evaluated."""
        return self._tables.matrix

    @property
    def task_aware(self) -> Matrix:
        """R with the task id known; all NaN where the stream has no such score beside it."""
        return self._tables.task_aware

    def require_lock(self) -> None:
        """Raise :class:`UsageError` if the directory is no longer ours to write."""
        self._lock.require()

    @property
    def wall_seconds(self) -> float:
        """Time that the run took so far, in all its processes."""
        return time.monotonic() - self._started

    def row(
        self,
        row: int,
        task: int | None,
        scores: Mapping[str, float],
        seconds: float,
        details: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        """Scores after ``row`` tasks were learned.

        Args:
            row: number of tasks learned, 0 before any training.
            task: index of the task just learned.
            scores: by task name, in [0, 1]; tasks that were not evaluated are left out.
            seconds: what the evaluation took.
            details: further measures of every task, ``{task name: {measure: value}}``.
        """
        found = {name: dict(values) for name, values in (details or {}).items() if values}
        self._event(
            "evaluation",
            row=row,
            task=task,
            task_name=None if task is None else self.task_names[task],
            scores=dict(scores),
            task_id_known=self.task_id_known,
            seconds=seconds,
            **({"details": found} if found else {}),
        )
        self._write(MATRIX, self._tables.matrix_csv())

    def _write(self, name: str, content: bytes) -> None:
        self._lock.require()
        write_atomically(self.directory / name, content)
        self._files[name] = digest(content)

    def layers(self, task: int, layers: Mapping[str, Mapping[str, float]]) -> None:
        """Numbers per layer after the task with index ``task``: {layer: {quantity: value}}."""
        self._event("layers", task=task, layers={k: dict(v) for k, v in layers.items()})
        self._write(LAYERS, self._tables.layers_csv())

    def general(
        self, task: int, row: int, values: Mapping[str, float], seconds: float, limit: int | None
    ) -> None:
        """A row of the second matrix: scores on tasks that the stream does not teach.

        Args:
            task: index of the task just learned; 0 before any.
            row: number of tasks learned.
            values: by name of the general task.
            seconds: what the evaluation took.
            limit: most questions of each.
        """
        self.probe("general", task, values, row=row, seconds=seconds, limit=limit)
        self._write(GENERAL, self._tables.general_csv())

    def finish(self, status: Status = "completed", **details: Any) -> dict[str, Any]:
        """Write ``summary.json``.

        Args:
            status: how the run ended.
            details: joins the summary, for example ``steps``.

        Returns:
            The summary.
        """
        confusion = self._tables.last_confusion
        summary = {
            "status": status,
            **self._facts,
            **summarise_alike(self.matrix, self.metrics),
            **({"by_metric": by_metric(self.matrix, self.metrics)} if self.mixed else {}),
            **task_aware_summary(self.task_aware),
            **self._tables.incremental(self._data),
            **self._tables.general_summary(),
            **({} if confusion is None else {"confusion_by_task": confusion.tolist()}),
            **self._tables.requests_summary(),
            "tasks": len(self.task_names),
            "tasks_learned": tasks_learned(self.matrix),
            "task_id_known": self.task_id_known,
            "wall_seconds": self.wall_seconds,
            **details,
        }
        self._write(SUMMARY, to_json(summary, 2).encode())
        self._finished = True
        self.status(status, files=self._files, **details)
        self._sinks.tell(lambda sink: sink.finish(summary, self.task_names, self.matrix))
        return summary

    def figures(self, paths: Sequence[Path]) -> None:
        """Hand pictures of the run to the sinks."""
        self._sinks.tell(lambda sink: sink.figures(paths))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None and not self._finished:
                self.finish()
            elif kind is not None and not self._finished:
                # A disk that is full must not hide what the run died of.
                with contextlib.suppress(UsageError):
                    self.finish(
                        "interrupted" if issubclass(kind, KeyboardInterrupt) else "failed",
                        error=f"{kind.__name__}: {error}",
                    )
        finally:
            self.close(failed=kind is not None)

    def close(self, failed: bool = False) -> None:
        """Let go of the directory and of the sinks."""
        self._sinks.close(failed)
        self._journal.close()
        self._lock.release()

    def _event(self, event: str, **fields: Any) -> None:
        self._lock.require()
        written = self._journal.append({"event": event, "time": now(), **fields})
        self._tables.take(written)
        self._sinks.tell(lambda sink: sink.event(written))
