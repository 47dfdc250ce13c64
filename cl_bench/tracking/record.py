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
(:mod:`cl_bench.tracking.journal`). Its events, by ``event``:

* ``status``: ``status`` (``started``, ``completed``, ``failed``, ``interrupted``) and facts;
  ``files`` {name: SHA-256} are those that were written before it.
* ``weights``: ``learned`` (tasks), ``file``, ``bytes``, ``sha256``: weights that were written.
* ``guards``, before any training, of a strategy that guards some parameters and not others:
  ``share`` of the ``trained`` weights that tasks share; ``unprotected`` and, in heads of one task
  each, ``per_task`` {group of parameters: weights}.
* ``evaluation``: ``row`` (tasks learned), ``task`` (index of the task just learned, or null),
  ``task_name``, ``scores`` {task name: value}, ``task_id_known``, ``seconds`` and, where a stream
  has more to measure, ``details`` {task name: {measure: value}}. Class-incremental streams have
  ``task_aware_accuracy`` there: the score with the task id known, beside the one without; and
  ``answered_as/<i>``: the share of samples whose answer is a class of task i.
* ``epoch``: ``task``, ``epoch`` (from 1), ``train_loss``, ``learning_rate``, ``seconds``,
  ``steps``.
* ``layers``: ``task``, ``layers`` {layer: {quantity: value}}.
* ``round``, in a federation: ``task``, ``round`` (from 1), ``train_loss``, ``clients`` (sampled),
  ``dropped``, ``steps``, ``bytes_down``, ``bytes_up``, ``client_seconds``, ``seconds``.
* ``forget``, of a stream with requests to forget: ``request`` (met so far, 0 before the first),
  ``task``, ``scores`` {task: value} and ``forgotten`` {request: value} on what each names, all of
  them every time; ``details`` as above. Requests are no columns of the matrix.
* ``prequential``, of a stream that is tested first: ``task``, ``position`` (samples of the task),
  ``answered`` (of the run), ``accuracy``, ``window``, ``faded``, ``kappa``, ``state_bytes``,
  ``predict_seconds``, ``learn_seconds``.
* ``federation``, after a task of one: ``task``, ``partition`` (hash of the split), ``holders``,
  ``population``, ``rounds``, bytes of all clients (``model_down``, ``model_up``,
  ``statistics_up``, ``memory_down``), ``client_seconds``.
* ``clients``, after a task of one: ``task``, ``forgetting`` and ``newest`` (score on the task just
  learned), each a list by client, and ``summary`` {quantity: value}.
* ``probe``: ``probe`` (``curve``, ``dynamics``, ``alignment``, ``landscape``, ``connectivity``,
  ``general_text``, ``general``, ``divergence``, ``cost``), ``task``, ``values`` (nested, by task
  name) and what else the probe tells; see :mod:`cl_bench.experiment.probes`.

Tasks are indices from 0; a number that is not finite is null. A run that is resumed drops the
events after its checkpoint and writes them again: apart from times they are equal. Those that
were dropped stand in ``resumes.jsonl``.
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


class Record:
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

    def guards(
        self,
        share: float,
        trained: int,
        unprotected: Mapping[str, int],
        per_task: Mapping[str, int],
    ) -> None:
        """What the strategy guards; see :class:`cl_bench.learners.guards.Guards`."""
        self._event(
            "guards",
            share=share,
            trained=trained,
            unprotected=dict(unprotected),
            per_task=dict(per_task),
        )

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

    def epoch(
        self,
        task: int,
        epoch: int,
        train_loss: float,
        learning_rate: float,
        seconds: float,
        steps: int,
        phase: str | None = None,
        **more: float,
    ) -> None:
        """One epoch of training on the task with index ``task``; epochs count from 1.

        Those of a ``phase`` after the task's own training are counted apart, and named.
        """
        self._event(
            "epoch",
            task=task,
            epoch=epoch,
            train_loss=train_loss,
            learning_rate=learning_rate,
            seconds=seconds,
            steps=steps,
            **({} if phase is None else {"phase": phase}),
            **more,
        )

    def layers(self, task: int, layers: Mapping[str, Mapping[str, float]]) -> None:
        """Numbers per layer after the task with index ``task``: {layer: {quantity: value}}."""
        self._event("layers", task=task, layers={k: dict(v) for k, v in layers.items()})
        self._write(LAYERS, self._tables.layers_csv())

    def weights(self, learned: int, file: str, content: bytes) -> None:
        """That the network's weights after ``learned`` tasks were written to ``file``."""
        sizes = {"bytes": len(content), "sha256": digest(content)}
        self._event("weights", learned=learned, file=file, **sizes)

    def round(self, task: int, round: int, **measured: float) -> None:
        """A round of a federation on the task with index ``task``; rounds count from 1."""
        self._event("round", task=task, round=round, **measured)

    def prequential(self, task: int, position: int, **measured: float) -> None:
        """Where a stream that is tested first stands, after so many samples of a task."""
        self._event("prequential", task=task, position=position, **measured)

    def forget(self, request: int, task: int, **measured: Any) -> None:
        """Scores after ``request`` requests to forget; 0 is before the first."""
        self._event("forget", request=request, task=task, **measured)

    def federation(self, task: int, **facts: Any) -> None:
        """How a federation learned a task, and what it cost."""
        self._event("federation", task=task, **facts)

    def clients(
        self,
        task: int,
        forgetting: Sequence[float],
        newest: Sequence[float],
        summary: Mapping[str, float],
    ) -> None:
        """What single clients gained and lost by a task; in lists by client."""
        lists = {"forgetting": list(forgetting), "newest": list(newest)}
        self._event("clients", task=task, **lists, summary=dict(summary))

    def probe(self, probe: str, task: int, values: Mapping[str, Any], **details: Any) -> None:
        """What a probe measured during or after the task with index ``task``.

        Args:
            probe: its name.
            task: index of the task that is learned.
            values: numbers, nested by task name.
            details: anything else, such as ``step`` and ``seconds``.
        """
        self._event("probe", probe=probe, task=task, values=dict(values), **details)

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

    def status(self, status: str, **details: Any) -> None:
        """Anything that happened to the run as a whole."""
        self._event("status", status=status, **details)

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
