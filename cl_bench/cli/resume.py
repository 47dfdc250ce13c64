"""``python -m cl_bench resume=<run directory>``: go on with a run that ended early."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cl_bench.cli.recorded import named, read_recorded
from cl_bench.cli.trust import Trust, read_trust
from cl_bench.errors import UsageError

if TYPE_CHECKING:
    from cl_bench.experiment.reopen import Resume


def resume(arguments: Sequence[str], composed: bool = False) -> None:
    """Go on with the run whose directory ``resume=...`` names, in its own configuration.

    Args:
        arguments: the command line, which may hold nothing else but ``trust=...``, ``from=start``:
            begin the run again, and move what it recorded to ``superseded`` in its directory, and
            ``trainer.devices=...`` and ``trainer.num_nodes=...``: other processes than it had.
        composed: this command line has composed the same configuration: all its code is trusted.

    Raises:
        UsageError: it does, the directory holds no run or a damaged one, there is no checkpoint to
            go on from, or the run's process is still there.
    """
    trust, arguments = read_trust(arguments)
    directory, others = named(arguments, "resume")
    counts, others = _counts(others)
    again: Resume = "start" if others == ["from=start"] else True
    if others and again is True:
        raise UsageError(
            "resume=... stands alone, or with from=start, trainer.devices or trainer.num_nodes, "
            f"but there is {' '.join(others)}: a run goes on with the settings it began with; for "
            "other settings start a new run"
        )
    # torch and lightning load here, not for a listing.
    from cl_bench.cli.run import run_config
    from cl_bench.tracking.reading import is_finished

    trusted = Trust(everything=True) if composed else trust
    run = read_recorded("resume", directory, trusted, whole=again is True)
    if again is True and is_finished(directory):
        print(f"{directory} is finished: there is nothing to resume")
        return
    run.require_names("resume", "go on with cl_bench.run(..., run_dir=..., resume=True)")
    here = directory.absolute()
    with run.surroundings():
        run.cfg.run_dir = str(directory if directory.absolute() == here else here)
        for option, count in counts.items():
            run.cfg.trainer[option] = count
        run_config(run.cfg, run.command, run.choices, resume=again)


def _counts(words: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """How many processes the command line asks for, and its other words."""
    found: dict[str, int] = {}
    others = []
    for word in words:
        option, _, value = word.partition("=")
        if option in ("trainer.devices", "trainer.num_nodes") and value.isdecimal():
            found[option.removeprefix("trainer.")] = int(value)
        else:
            others.append(word)
    return found, others
