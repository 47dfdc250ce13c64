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
  ``task_aware_accuracy`` there: the score with the task id known, beside the one without.
* ``epoch``: ``task``, ``epoch`` (from 1), ``train_loss``, ``learning_rate``, ``seconds``,
  ``steps``.
* ``layers``: ``task``, ``layers`` {layer: {quantity: value}}.
* ``round``, in a federation: ``task``, ``round`` (from 1), ``train_loss``, ``clients`` (sampled),
  ``dropped``, ``steps``, ``bytes_down``, ``bytes_up``, ``client_seconds``, ``seconds``.
* ``federation``, after a task of one: ``task``, ``partition`` (hash of the split), ``holders``,
  ``population``, ``rounds``, bytes of all clients (``model_down``, ``model_up``,
  ``statistics_up``, ``memory_down``), ``client_seconds``.
* ``clients``, after a task of one: ``task``, ``forgetting`` and ``newest`` (score on the task just
  learned), each a list by client, and ``summary`` {quantity: value}.
* ``probe``: ``probe`` (``curve``, ``dynamics``, ``alignment``, ``landscape``, ``general_text``,
  ``cost``), ``task``, ``values`` (nested, by task name) and what else the probe tells; see
  :mod:`cl_bench.experiment.probes`.

Tasks are indices from 0; a number that is not finite is null. A run that is resumed drops the
events after its checkpoint and writes them again: apart from times they are the same. Those that
were dropped stand in ``resumes.jsonl``.
"""

import contextlib
import hashlib
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import numpy as np

from cl_bench.contracts import UsageError
from cl_bench.metrics import Matrix, summarise, tasks_learned
from cl_bench.tracking.aside import SUPERSEDED, Aside
from cl_bench.tracking.environment import describe_environment
from cl_bench.tracking.files import (
    CHOICES,
    COMMAND,
    CONFIG,
    DATA,
    ENVIRONMENT,
    LAYERS,
    LOCK,
    MATRIX,
    PUT_BACK,
    RESULTS,
    RESUMES,
    SUMMARY,
    append_line,
    forget_scratch,
    to_json,
    write_atomically,
)
from cl_bench.tracking.journal import Journal, Line
from cl_bench.tracking.lock import Lock, claim, ourselves, take_lock
from cl_bench.tracking.reading import require_data
from cl_bench.tracking.tables import Event, Tables
from cl_bench.tracking.verify import verified

Status = Literal["completed", "failed", "interrupted"]


class Sink(Protocol):
    """A logger beside the files. Whatever it raises costs the run nothing but the sink."""

    name: str
    """For the warning when it fails."""

    def start(self, task_names: Sequence[str]) -> None:
        """The run begins, or is resumed."""

    def resume(self, events: Sequence[Event]) -> None:
        """After :meth:`start`: what was recorded, and told, before this process."""

    def event(self, event: Event) -> None:
        """One line of ``results.jsonl``, as a reader gets it."""

    def finish(self, summary: Mapping[str, Any], task_names: Sequence[str], R: Matrix) -> None:
        """The run ended: what ``summary.json`` holds, and the accuracy matrix."""

    def figures(self, paths: Sequence[Path]) -> None:
        """Pictures of the finished run."""

    def close(self, failed: bool) -> None:
        """Nothing more comes."""


class Record:
    """What happened in one run, in one directory. Use :meth:`open`, and as a context manager.

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
    ) -> None:
        self.directory = lock.path.parent
        self.task_names = list(task_names)
        self.task_id_known = task_id_known
        self._lock = lock
        self._tables = Tables(task_names)
        self._facts = dict(facts)
        self._sinks = list(sinks)
        self._files: dict[str, str] = {}
        self._finished = False
        self._journal = Journal(self.directory, lines)
        self._tell(lambda sink: sink.start(self.task_names))
        self._started = time.monotonic() - seconds

    @classmethod
    def open(
        cls,
        directory: Path | str,
        task_names: Sequence[str],
        *,
        task_id_known: bool,
        config: str = "",
        command: str = "",
        choices: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        environment: Mapping[str, Any] | None = None,
        facts: Mapping[str, Any] | None = None,
        sinks: Sequence[Sink] = (),
    ) -> "Record":
        """Take a directory for a new run and write down how it starts.

        Args:
            directory: made if need be; must not hold a run already.
            task_names: in the order in which the tasks are learned.
            task_id_known: whether the task id is known at test time.
            config: the resolved configuration, as YAML.
            command: the exact command line.
            choices: which option of each configuration group was chosen.
            data: stream name, fingerprint, scenario, origin of every task.
            environment: joins versions and platform, for example ``processes`` and
                ``effective_batch``.
            facts: what tables and figures call this run by, such as ``stream``, ``strategy`` and
                ``seed``; they stand in the first event and in the summary.
            sinks: loggers that get every event too.

        Raises:
            UsageError: the directory cannot be made or written, holds a run, is being written by
                another process, or its name holds ``=`` or ``,``.
        """
        path = Path(directory)
        lock = claim(path)
        files = {
            COMMAND: f"{command}\n",
            **({CHOICES: to_json(choices, 2)} if choices else {}),
            ENVIRONMENT: to_json({**describe_environment(), **(environment or {})}, 2),
            DATA: to_json({**(data or {}), "task_names": list(task_names)}, 2),
            CONFIG: config,  # the last one: a run can be resumed if it is there
        }
        try:
            for name, text in files.items():
                write_atomically(path / name, text.encode())
            record = cls(lock, [], task_names, task_id_known, facts or {}, sinks)
            record._files = {name: digest(text.encode()) for name, text in files.items()}
            record._begin()
        except BaseException:
            # Nothing happened here yet: the same directory can be given again.
            for name in (*files, RESULTS):
                with contextlib.suppress(OSError):  # must not hide what came before
                    (path / name).unlink(missing_ok=True)
            lock.release()
            raise
        return record

    @classmethod
    def resume(
        cls,
        directory: Path | str,
        task_names: Sequence[str],
        *,
        task_id_known: bool,
        find: Callable[[list[Line]], tuple[int, float, str]] | None,
        data: Mapping[str, Any] | None = None,
        facts: Mapping[str, Any] | None = None,
        sinks: Sequence[Sink] = (),
    ) -> "Record":
        """Go on with a run whose process is gone. Nothing is changed before all was checked.

        Args:
            directory: of the run.
            task_names: as the run was opened with.
            task_id_known: as the run was opened with.
            find: from where: what :attr:`position` and :attr:`wall_seconds` were there, and what
                the run is resumed from, for ``resumes.jsonl``. It is given the events. None begins
                the run again, whatever there is: that is moved to ``superseded``.
            data: as the run was opened with; another fingerprint is refused.
            facts: as the run was opened with.
            sinks: loggers that get every event from here on.

        Raises:
            UsageError: the directory holds no run, its process is alive, its files or its data
                have changed, or the disk refuses. What was recorded is as it was.
        """
        path = Path(directory)
        if not (path / CONFIG).exists():
            raise UsageError(
                f"{path} holds no run ({CONFIG} is missing): give the directory of one"
            )
        lock = take_lock(path)
        try:
            if find is None:
                set_aside(path)
                lines: list[Line] = []
                position, seconds, source = 0, 0.0, ""
            else:
                lines = verified(path, task_names) if _has_results(path) else []
                require_data(path, data or {})
                position, seconds, source = find(lines)
            kept = [line for line in lines if line.end <= position]
            dropped = [line.event for line in lines[len(kept) :]]
            record = cls(lock, kept, task_names, task_id_known, facts or {}, sinks, seconds)
            record._go_on([line.event for line in kept], dropped, source)
        except BaseException:
            lock.release()
            raise
        return record

    def _begin(self) -> None:
        self.status("started", task_id_known=self.task_id_known, files=self._files, **self._facts)
        self._files = {}

    def _go_on(self, events: Sequence[Event], dropped: Sequence[Event], source: str) -> None:
        forget_scratch(self.directory)
        told = {"process": ourselves(), "from": source or "the beginning", "dropped": dropped}
        append_line(self.directory / RESUMES, to_json({"time": _now(), **told}))
        self._journal.cut()
        for event in events:
            self._tables.take(event)
        for name in (MATRIX, LAYERS, SUMMARY):  # they follow from the events
            (self.directory / name).unlink(missing_ok=True)
        if self._tables.last_row >= 0:
            self._write(MATRIX, self._tables.matrix_csv())
        if self._tables.layers:
            self._write(LAYERS, self._tables.layers_csv())
        self._tell(lambda sink: sink.resume(events))
        if not events:
            there = [n for n in BEGUN_WITH if (self.directory / n).exists()]
            self._files = {name: digest((self.directory / name).read_bytes()) for name in there}
            self._begin()

    @property
    def position(self) -> int:
        """Bytes of ``results.jsonl`` so far."""
        return self._journal.position

    @property
    def chain(self) -> str:
        """Of ``results.jsonl`` so far; with :attr:`position`, what a checkpoint belongs to."""
        return self._journal.chain

    @property
    def matrix(self) -> Matrix:
        """R so far, (T + 1, T), NaN where nothing was evaluated."""
        return self._tables.matrix

    @property
    def task_aware(self) -> Matrix:
        """The same with the task id known; all NaN where the stream has no such score beside it."""
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
        **more: float,
    ) -> None:
        """One epoch of training on the task with index ``task``; epochs count from 1."""
        self._event(
            "epoch",
            task=task,
            epoch=epoch,
            train_loss=train_loss,
            learning_rate=learning_rate,
            seconds=seconds,
            steps=steps,
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
        """What a probe found during or after the task with index ``task``.

        Args:
            probe: its name.
            task: index of the task that is learned.
            values: numbers, nested by task name.
            details: anything else, such as ``step`` and ``seconds``.
        """
        self._event("probe", probe=probe, task=task, values=dict(values), **details)

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
        summary = {
            "status": status,
            **self._facts,
            **summarise(self.matrix),
            **task_aware_summary(self.task_aware),
            "tasks": len(self.task_names),
            "tasks_learned": tasks_learned(self.matrix),
            "task_id_known": self.task_id_known,
            "wall_seconds": self.wall_seconds,
            **details,
        }
        self._write(SUMMARY, to_json(summary, 2).encode())
        self._finished = True
        self.status(status, files=self._files, **details)
        self._tell(lambda sink: sink.finish(summary, self.task_names, self.matrix))
        return summary

    def figures(self, paths: Sequence[Path]) -> None:
        """Hand pictures of the run to the sinks."""
        self._tell(lambda sink: sink.figures(paths))

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
        self._tell(lambda sink: sink.close(failed))
        self._sinks = []
        self._journal.close()
        self._lock.release()

    def _event(self, event: str, **fields: Any) -> None:
        self._lock.require()
        written = self._journal.append({"event": event, "time": _now(), **fields})
        self._tables.take(written)
        self._tell(lambda sink: sink.event(written))

    def _tell(self, call: Callable[[Sink], None]) -> None:
        """Call every sink; one that raises is dropped with a warning, and the run goes on."""
        for sink in list(self._sinks):
            try:
                call(sink)
            except Exception as error:
                self._sinks.remove(sink)
                # What it sent so far should arrive, and its processes should end.
                with contextlib.suppress(Exception):
                    sink.close(failed=True)
                warnings.warn(
                    f"{sink.name} failed and gets nothing more of this run "
                    f"({type(error).__name__}: {error}); the files in {self.directory} go on",
                    stacklevel=3,
                )


def task_aware_summary(R: Matrix) -> dict[str, float]:
    """The summaries under ``task_aware_...``; none where nothing was scored with the task id."""
    if not np.isfinite(R).any():
        return {}
    return {f"task_aware_{name}": value for name, value in summarise(R).items()}


BEGUN_WITH = (COMMAND, CHOICES, ENVIRONMENT, DATA, CONFIG)
"""Files that are written before anything happens."""


def digest(content: bytes) -> str:
    """SHA-256, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def _has_results(path: Path) -> bool:
    """Whether there are events; a run that was killed before its first one has nothing at all.

    Raises:
        UsageError: there are none, though the run has got further: they were lost, or somebody was
            stopped while beginning it again.
    """
    if (path / RESULTS).exists():
        return True
    if any((path / name).exists() for name in (MATRIX, SUMMARY, "checkpoints", "weights")):
        raise UsageError(
            f"{path / RESULTS} is missing; {PUT_BACK}, or begin the run again: resume={path} "
            "from=start (what is there is moved to superseded/ in it, and stays)"
        )
    return False


def set_aside(directory: Path) -> Aside:
    """Move all that a run has reached to ``superseded``; what it began with stays."""
    aside = Aside(directory)
    # The journal first: without it, whoever is stopped here is told to begin again.
    for path in sorted(directory.iterdir(), key=lambda path: (path.name != RESULTS, path.name)):
        if path.name not in (*BEGUN_WITH, LOCK, RESUMES, SUPERSEDED) and path.name != "wandb":
            aside.take(path)
    return aside


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
