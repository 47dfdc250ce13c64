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
``run.lock``              only while a process writes: which one
========================  ======================================================================

``results.jsonl`` is the truth from which the tables can be rebuilt. Its events, by ``event``:

* ``status``: ``status`` (``started``, ``completed``, ``failed``, ``interrupted``) and facts.
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
events after its checkpoint and writes them again: apart from times they are the same.
"""

import contextlib
import csv
import errno
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import socket
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Protocol, Self

import numpy as np

import cl_bench
from cl_bench.contracts import UsageError
from cl_bench.metrics import TASK_AWARE, Matrix, empty_matrix, summarise, tasks_learned

RESULTS, MATRIX, SUMMARY, LOCK = "results.jsonl", "accuracy_matrix.csv", "summary.json", "run.lock"
CONFIG, LAYERS = "config.yaml", "layers.csv"
COMMAND, CHOICES, RESUMES = "command.txt", "choices.json", "resumes.jsonl"

PACKAGES = (
    "torch",
    "lightning",
    "hydra-core",
    "omegaconf",
    "numpy",
    "datasets",
    "scikit-learn",
    "wandb",
    "pandas",
    "pillow",
)
"""Whose versions stand in ``environment.json``, beside our own."""

Status = Literal["completed", "failed", "interrupted"]
Event = Mapping[str, Any]


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
        matrix: R so far, (T + 1, T), NaN where nothing was evaluated.
        task_aware: the same with the task id known; all NaN where the stream has no such score
            beside the other.
    """

    def __init__(
        self,
        directory: Path,
        task_names: Sequence[str],
        task_id_known: bool,
        facts: Mapping[str, Any],
        sinks: Sequence[Sink],
        seconds: float = 0.0,
    ) -> None:
        self.directory = directory
        self.task_names = list(task_names)
        self.task_id_known = task_id_known
        self.matrix = empty_matrix(len(self.task_names))
        self.task_aware = empty_matrix(len(self.task_names))
        self._facts = dict(facts)
        self._sinks = list(sinks)
        self._layers: list[dict[str, Any]] = []
        self._last_row = -1
        self._finished = False
        with _explained(directory):
            self._results = os.open(
                directory / RESULTS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666
            )
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
        _claim(path)
        files = {
            COMMAND: f"{command}\n",
            **({CHOICES: _json(choices, 2)} if choices else {}),
            "environment.json": _json({**describe_environment(), **(environment or {})}, 2),
            "data.json": _json({**(data or {}), "task_names": list(task_names)}, 2),
            CONFIG: config,  # the last one: a run can be resumed if it is there
        }
        try:
            for name, text in files.items():
                write_atomically(path / name, text.encode())
            record = cls(path, task_names, task_id_known, facts or {}, sinks)
            record.status("started", task_id_known=task_id_known, **record._facts)
        except BaseException:
            # Nothing happened here yet: the same directory can be given again.
            for name in (*files, RESULTS, LOCK):
                with contextlib.suppress(OSError):  # must not hide what came before
                    (path / name).unlink(missing_ok=True)
            raise
        return record

    @classmethod
    def resume(
        cls,
        directory: Path | str,
        task_names: Sequence[str],
        *,
        task_id_known: bool,
        position: int,
        seconds: float = 0.0,
        source: str = "",
        data: Mapping[str, Any] | None = None,
        facts: Mapping[str, Any] | None = None,
        sinks: Sequence[Sink] = (),
    ) -> "Record":
        """Go on with a run whose process is gone.

        Args:
            directory: of the run.
            task_names: as the run was opened with.
            task_id_known: as the run was opened with.
            position: what :attr:`position` was; later events are dropped. 0 begins anew.
            seconds: what :attr:`wall_seconds` was.
            source: what the run is resumed from, for ``resumes.jsonl``.
            data: as the run was opened with; another fingerprint is refused.
            facts: as the run was opened with.
            sinks: loggers that get every event from here on.

        Raises:
            UsageError: the directory holds no run, its process is alive, its data has changed, or
                the disk refuses.
        """
        path = Path(directory)
        _require_run(path, data or {})
        _lock(path)
        try:
            with _explained(path / RESULTS):
                descriptor = os.open(path / RESULTS, os.O_WRONLY | os.O_CREAT, 0o666)
                try:
                    os.ftruncate(descriptor, position)
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
                for name in (MATRIX, LAYERS, SUMMARY):
                    (path / name).unlink(missing_ok=True)
            events = read_results(path)
            record = cls(path, task_names, task_id_known, facts or {}, sinks, seconds)
            record._go_on(events, source)
        except BaseException:
            with contextlib.suppress(OSError):
                (path / LOCK).unlink(missing_ok=True)
            raise
        return record

    def _go_on(self, events: Sequence[Event], source: str) -> None:
        for event in events:
            self._take(event)
        if self._last_row >= 0:
            self._write_matrix()
        if self._layers:
            self._write_layers()
        line = _json({"time": _now(), "process": _ourselves(), "from": source or "the beginning"})
        with _explained(self.directory / RESUMES), (self.directory / RESUMES).open("a") as file:
            file.write(f"{line}\n")
        self._tell(lambda sink: sink.resume(events))
        if not events:
            self.status("started", task_id_known=self.task_id_known, **self._facts)

    @property
    def position(self) -> int:
        """Bytes of ``results.jsonl`` so far."""
        return os.lseek(self._results, 0, os.SEEK_END)

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
        self._write_matrix()

    def _write_matrix(self) -> None:
        write_atomically(
            self.directory / MATRIX,
            _csv(
                ["after_task", *self.task_names],
                ([i, *map(_cell, self.matrix[i])] for i in range(self._last_row + 1)),
            ),
        )

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
        self._write_layers()

    def _write_layers(self) -> None:
        columns = list(dict.fromkeys(key for line in self._layers for key in line))
        write_atomically(
            self.directory / LAYERS,
            _csv(columns, ([_cell(line.get(c)) for c in columns] for line in self._layers)),
        )

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
        write_atomically(self.directory / SUMMARY, _json(summary, 2).encode())
        self._finished = True
        self.status(status, **details)
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
        if self._results >= 0:
            os.close(self._results)
            self._results = -1
            # A lock that cannot be deleted is taken over once this process is gone.
            with contextlib.suppress(OSError):
                (self.directory / LOCK).unlink(missing_ok=True)

    def _event(self, event: str, **fields: Any) -> None:
        line = _json({"event": event, "time": _now(), **fields})
        path = self.directory / RESULTS
        with _explained(path):
            end = os.lseek(self._results, 0, os.SEEK_END)
            try:
                _write(self._results, f"{line}\n".encode())
                os.fsync(self._results)
            except OSError:
                # Half a line must not stand before the next one.
                with contextlib.suppress(OSError):
                    os.ftruncate(self._results, end)
                raise
        written = json.loads(line)
        self._take(written)
        self._tell(lambda sink: sink.event(written))

    def _take(self, event: Event) -> None:
        """Enter an event as a reader gets it: tables are the same, live and rebuilt."""
        if event["event"] == "evaluation":
            self._last_row = max(self._last_row, event["row"])
            for name, score in event["scores"].items():
                column = self.task_names.index(name)
                self.matrix[event["row"], column] = np.nan if score is None else score
            _enter_task_aware(self.task_aware, self.task_names, event)
        elif event["event"] == "layers":
            for layer, values in event["layers"].items():
                self._layers.append({"task": event["task"], "layer": layer, **values})

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
    lines = _read(path).split("\n")
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
    header, *rows = csv.reader(io.StringIO(_read(path), newline=""))
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
            _enter_task_aware(task_aware, names, event)
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


def _enter_task_aware(R: Matrix, task_names: Sequence[str], event: Event) -> None:
    for name, measures in event.get("details", {}).items():
        score = measures.get(TASK_AWARE)
        if score is not None:
            R[event["row"], task_names.index(name)] = score


def task_aware_summary(R: Matrix) -> dict[str, float]:
    """The summaries under ``task_aware_...``; none where nothing was scored with the task id."""
    if not np.isfinite(R).any():
        return {}
    return {f"task_aware_{name}": value for name, value in summarise(R).items()}


def is_finished(directory: Path | str) -> bool:
    """Whether a run is completed, and its process has left nothing undone (such as figures)."""
    path = Path(directory)
    if (path / LOCK).exists() or not (path / RESULTS).exists():
        return False
    statuses = [e["status"] for e in read_results(path) if e["event"] == "status"]
    return statuses[-1:] == ["completed"]


def describe_environment() -> dict[str, Any]:
    """Python, platform, package versions, and the git commit of the current directory."""
    versions: dict[str, str | None] = {"cl_bench": cl_bench.__version__}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "packages": versions,
        # Files that git does not know count as changes: they may hold the strategy that ran.
        "git": {"commit": commit, "dirty": None if changes is None else bool(changes)},
    }


def write_atomically(path: Path, content: bytes | Callable[[IO[bytes]], None]) -> None:
    """Put ``content`` in place of whatever ``path`` held: a reader sees the old or the new, whole.

    Args:
        path: of the file.
        content: bytes, or what writes them to an empty file.

    Raises:
        UsageError: the file system refuses, for example because it is full.
    """
    # One writer per directory (the lock), so a fixed name leaves at most one stray file.
    scratch = path.with_name(f".{path.name}.tmp")
    with _explained(path):
        try:
            descriptor = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                if isinstance(content, bytes):
                    _write(descriptor, content)
                else:
                    with os.fdopen(descriptor, "w+b", closefd=False) as file:
                        content(file)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            scratch.replace(path)
            _sync_directory(path.parent)
        except OSError:
            with contextlib.suppress(OSError):
                scratch.unlink()
            raise


def make_directory(path: Path) -> None:
    """Make a directory and its parents; raises :class:`UsageError` where the disk refuses."""
    with _explained(path):
        path.mkdir(parents=True, exist_ok=True)


def delete(path: Path) -> None:
    """Delete a file if it is there; raises :class:`UsageError` where the disk refuses."""
    with _explained(path):
        path.unlink(missing_ok=True)


def _sync_directory(path: Path) -> None:
    """A name in a directory is lost in a power failure until the directory is on disk too."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _claim(path: Path) -> None:
    """Make the directory and its lock; of several processes that try, one comes back."""
    if any(c in str(path) for c in "=,"):
        raise UsageError(
            f"run_dir={path}: a name with '=' or ',' could not be given back on the command line; "
            "use another run_dir=..."
        )
    make_directory(path)
    _lock(path)
    if any((path / name).exists() for name in (RESULTS, CONFIG, MATRIX, SUMMARY)):
        (path / LOCK).unlink()
        raise UsageError(
            f"run_dir={path} already holds a run: give another run_dir=..., delete {path}, or go "
            f"on with it: python -m cl_bench resume={path}"
        )


def _lock(path: Path) -> None:
    """Make the lock of a directory; that of a process which is gone is taken over."""
    lock = path / LOCK
    with _explained(lock):
        try:
            descriptor = os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            if _take_over(lock):
                return
            raise UsageError(
                f"run_dir={path} is being written by {_holder(lock)}: give another run_dir=...; "
                f"if that process is gone, delete {lock}"
            ) from None
        try:
            _write(descriptor, f"{_ourselves()}\n".encode())
        except OSError:
            with contextlib.suppress(OSError):
                lock.unlink()
            raise
        finally:
            os.close(descriptor)


def _take_over(lock: Path) -> bool:
    """Whether the lock was that of a dead process, and now is ours; of several that try, one's."""
    if os.name == "nt":
        return False
    import fcntl

    try:
        descriptor = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if not _is_gone(os.read(descriptor, 1000).decode()):
            return False
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.ftruncate(descriptor, 0)
        _write(descriptor, f"{_ourselves()}\n".encode())
        # Whoever held it may have been ending, and have deleted the name meanwhile.
        return lock.exists() and os.path.samestat(os.fstat(descriptor), lock.stat())
    finally:
        os.close(descriptor)


def _ourselves() -> str:
    started = _start_time(os.getpid())
    return f"process {os.getpid()} on {socket.gethostname()}" + (
        f", started at tick {started}" if started else ""
    )


def _start_time(process: int) -> str | None:
    """When a process began, in clock ticks since boot: process ids are used again. Linux only."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _is_gone(holder: str) -> bool:
    """Whether the process that a lock names ran on this host, and is there no more."""
    held = re.fullmatch(r"process (\d+) on (\S+?)(?:, started at tick (\d+))?", holder.strip())
    if held is None or held[2] != socket.gethostname():
        return False
    process = int(held[1])
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    started = _start_time(process)
    return None not in (held[3], started) and held[3] != started


def _require_run(path: Path, data: Mapping[str, Any]) -> None:
    if not (path / CONFIG).exists():
        raise UsageError(f"{path} holds no run ({CONFIG} is missing): give the directory of a run")
    written = json.loads(_read(path / "data.json"))
    then, now = written.get("fingerprint"), data.get("fingerprint")
    if then != now:
        raise UsageError(
            f"the data of {path} has changed (fingerprint {then}, now {now}): a run is resumed on "
            "the data it began with"
        )


def _holder(lock: Path) -> str:
    """Who wrote the lock; it may have vanished, or not have been filled in yet."""
    try:
        return lock.read_text().strip() or "another process"
    except OSError:
        return "another process"


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into a :class:`UsageError` with a remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = (
                "free some space or give run_dir=... on another disk; "
                "what was recorded before is intact"
            )
        else:
            remedy = "give run_dir=... where you may write"
        raise UsageError(f"cannot write {path} ({error.strerror or error}): {remedy}") from error


def _write(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except FileNotFoundError:
        what = "holds no run" if not (path.parent / CONFIG).exists() else "has no results yet"
        raise UsageError(
            f"{path.parent} {what} ({path.name} is missing): give the directory of a run"
        ) from None


def _json(value: Mapping[str, Any], indent: int | None = None) -> str:
    return json.dumps(_finite(value), indent=indent, allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    """The same with plain numbers, and None for those that JSON does not know."""
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _csv(header: Sequence[str], rows: Iterator[list[Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode()


def _cell(value: Any) -> Any:
    """A number with all its digits; nothing for NaN."""
    if isinstance(value, float):
        return "" if math.isnan(value) else repr(float(value))
    return value


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _git(*arguments: str) -> str | None:
    """What git says about the current directory; None without git or without a repository."""
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
