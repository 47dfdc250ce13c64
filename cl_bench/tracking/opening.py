"""Taking a directory for a record: a new one, or that of a run whose process is gone."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cl_bench.contracts import UsageError
from cl_bench.tracking.aside import SUPERSEDED, Aside
from cl_bench.tracking.environment import describe_environment
from cl_bench.tracking.files import (
    CHOICES,
    COMMAND,
    CONFIG,
    DATA,
    ENVIRONMENT,
    LOCK,
    MATRIX,
    PUT_BACK,
    RESULTS,
    RESUMES,
    SUMMARY,
    append_line,
    digest,
    forget_scratch,
    to_json,
    write_atomically,
)
from cl_bench.tracking.journal import Line, now
from cl_bench.tracking.lock import claim, ourselves, take_lock
from cl_bench.tracking.reading import require_data
from cl_bench.tracking.record import Record
from cl_bench.tracking.sinks import Sink
from cl_bench.tracking.tables import Event
from cl_bench.tracking.verify import verified

BEGUN_WITH = (COMMAND, CHOICES, ENVIRONMENT, DATA, CONFIG)
"""Files that are written before anything happens."""


def open_record(
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
) -> Record:
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
        record = Record(lock, [], task_names, task_id_known, facts or {}, sinks, data=data)
        record.begin({name: digest(text.encode()) for name, text in files.items()})
    except BaseException:
        # Nothing happened here yet: the same directory can be given again.
        for name in (*files, RESULTS):
            with contextlib.suppress(OSError):  # must not hide what came before
                (path / name).unlink(missing_ok=True)
        lock.release()
        raise
    return record


def resume_record(
    directory: Path | str,
    task_names: Sequence[str],
    *,
    task_id_known: bool,
    find: Callable[[list[Line]], tuple[int, float, str]] | None,
    data: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    sinks: Sequence[Sink] = (),
) -> Record:
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
        raise UsageError(f"{path} holds no run ({CONFIG} is missing): give the directory of a run")
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
        record = Record(
            lock, kept, task_names, task_id_known, facts or {}, sinks, seconds, data=data
        )
        forget_scratch(path)
        _note(path, source, dropped)
        record.go_on([line.event for line in kept])
        if not kept:
            there = [path / name for name in BEGUN_WITH if (path / name).exists()]
            record.begin({file.name: digest(file.read_bytes()) for file in there})
    except BaseException:
        lock.release()
        raise
    return record


def _note(directory: Path, source: str, dropped: Sequence[Event]) -> None:
    """Write into ``resumes.jsonl`` that a run goes on, on disk before anything is dropped."""
    told = {"process": ourselves(), "from": source or "the beginning", "dropped": dropped}
    append_line(directory / RESUMES, to_json({"time": now(), **told}))


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
