"""``python -m cl_bench resume=<run directory>``: go on with a run that ended early."""

from collections.abc import Sequence
from pathlib import Path

from cl_bench.cli.recorded import read_recorded
from cl_bench.errors import UsageError


def resume(arguments: Sequence[str]) -> None:
    """Go on with the run whose directory ``resume=...`` names, in its own configuration.

    Args:
        arguments: the command line, which may hold nothing else.

    Raises:
        UsageError: it does, the directory holds no run, or the run's process is still there.
    """
    others = [a for a in arguments if not a.startswith("resume=")]
    if others or len(arguments) > 1:
        raise UsageError(
            f"resume=... stands alone, but there is {' '.join(others) or 'another one'}: a run "
            "goes on with the settings it began with; for other settings start a new run"
        )
    directory = Path(arguments[0].removeprefix("resume="))
    # torch and lightning load here, not for a listing.
    from cl_bench.cli.build import run_config
    from cl_bench.tracking.reading import is_finished

    run = read_recorded("resume", directory)
    if is_finished(directory):
        print(f"{directory} is finished: there is nothing to resume")
        return
    run.require_names("resume", "go on with cl_bench.run(..., run_dir=..., resume=True)")
    here = directory.absolute()
    with run.surroundings():
        run.cfg.run_dir = str(directory if directory.absolute() == here else here)
        run_config(run.cfg, run.command, run.choices, resume=True)
