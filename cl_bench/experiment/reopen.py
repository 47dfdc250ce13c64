"""Going on with a run that ended early: what is checked before anything is touched."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from cl_bench.contracts import UsageError
from cl_bench.experiment.checkpoint import Checkpoint, Checkpoints
from cl_bench.parallel.ranks import decided
from cl_bench.tracking import Record, resume_record
from cl_bench.tracking.aside import Aside
from cl_bench.tracking.files import RESULTS
from cl_bench.tracking.journal import Line

Resume = bool | Literal["start"]
"""Whether a run goes on: from its newest checkpoint, or again from its start."""

LEARNING = ("epoch", "layers", "round", "federation", "clients")
"""Events that come after the first checkpoint, where checkpoints are written at all."""


def reopen(
    directory: Path,
    checkpoints: Checkpoints,
    begun: Mapping[str, Any],
    resume: Resume,
    say: Callable[[str], None],
) -> tuple[Record, Checkpoint | None]:
    """Open the record of a run again. What its new beginning does not stand on is moved aside.

    Args:
        directory: of the run.
        checkpoints: of the run.
        begun: what :func:`~cl_bench.tracking.open_record` was given.
        resume: from where.
        say: told what is passed over, and where it went.

    Returns:
        The record, and the checkpoint to go on from; None where the run begins again.

    Raises:
        UsageError: there is nothing to go on from, or something cannot be read. The run's
            directory is as it was.
    """
    found: list[Checkpoint | None] = [None]

    def find(lines: list[Line]) -> tuple[int, float, str]:
        found[0] = last = _newest(directory, checkpoints, lines, say)
        if last is None:
            return 0, 0.0, ""
        return last.position, last.state["wall_seconds"], last.path.name

    record = resume_record(directory, **begun, find=None if resume == "start" else find)
    aside = Aside(directory)
    try:
        checkpoints.set_aside_after(found[0], aside)
    except BaseException:
        record.close(failed=True)
        raise
    if aside.moved:
        say(f"{', '.join(aside.moved)}: moved to {aside.folder}")
    return record, found[0]


def follow(checkpoints: Checkpoints, last: Checkpoint | None) -> Checkpoint | None:
    """The checkpoint that process 0 goes on from, in every process."""
    name = decided(lambda: last.path.name if last else None)
    if last is not None or name is None:
        return last
    return checkpoints.read(checkpoints.directory / name)


def _newest(
    directory: Path, checkpoints: Checkpoints, lines: list[Line], say: Callable[[str], None]
) -> Checkpoint | None:
    """The newest usable checkpoint; None for a run that was killed before it had one."""
    causes: list[str] = []
    ends = {line.end: line.chain for line in lines}
    results = directory / RESULTS

    def against(found: Checkpoint) -> str | None:
        if found.position > max(ends, default=0):
            return f"{results} is shorter than it was then"
        if ends.get(found.position) is None:
            return f"byte {found.position} of {results}, where it belongs, is not the end of a line"
        if found.chain not in (None, ends[found.position]):
            return f"{results} tells of another past than it does"
        return None

    _require_reachable(checkpoints.directory)
    last = checkpoints.newest(against, causes.append)
    for cause in causes:
        say(f"{cause}: the one before it is used" if last else cause)
    if last is not None or (not causes and not _was_learning(lines)):
        return last
    if not causes:
        causes = [f"there is no checkpoint in {checkpoints.directory}"]
        if not checkpoints.settings.enabled:
            causes = ["the run wrote none (checkpoint.enabled=false)"]
    raise UsageError(
        f"{directory} has no checkpoint to go on from: {'; '.join(causes)}. Put back what is "
        f"missing, or begin the run again: resume={directory} from=start (what is there is moved "
        "to superseded/ in it, and stays)"
    )


def _require_reachable(folder: Path) -> None:
    if folder.is_symlink() and not folder.exists():
        raise UsageError(
            f"{folder} leads to {folder.readlink()}, which is not there: make it reachable again"
        )
    if folder.exists():
        try:
            next(folder.iterdir(), None)
        except OSError as error:
            raise UsageError(f"cannot read {folder} ({error.strerror or error})") from None


def _was_learning(lines: list[Line]) -> bool:
    """Whether a run got as far as its first checkpoint."""
    return any(
        line.event["event"] in LEARNING
        or (line.event["event"] == "evaluation" and line.event["row"] > 0)
        for line in lines
    )
