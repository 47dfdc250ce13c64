"""The entry point: compose a configuration with Hydra, check it, run it."""

import errno
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from cl_bench.cli.explain import refuse_empty
from cl_bench.cli.folders import conf_directory, offer_probes
from cl_bench.cli.jobs import Jobs, config_folders, read_flags
from cl_bench.cli.ledger import Ledger
from cl_bench.cli.listing import print_listing
from cl_bench.cli.messages import notes, say, say_error
from cl_bench.cli.output import patient_output
from cl_bench.cli.reproduce import reproduce
from cl_bench.cli.resume import resume
from cl_bench.cli.search import write_chosen
from cl_bench.cli.signals import deferred, stopping
from cl_bench.cli.sweep import command as sweep_command
from cl_bench.cli.sweep import place
from cl_bench.cli.threads import wait_passively
from cl_bench.cli.words import command
from cl_bench.cli.workers import go_through
from cl_bench.ends import COMPLETED, Stopped
from cl_bench.errors import UsageError

DIFFERENT = 1
"""Exit status of a reproduction that came to something else."""

FAILED = 2
"""Exit status after an error that the user can put right."""


@contextmanager
def _errors_from_hydra() -> Iterator[None]:
    """Hydra hands every error over instead of printing it with a traceback."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        del os.environ["HYDRA_FULL_ERROR"]
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


def main() -> int:
    """Run what the command line says.

    Returns:
        The exit status: 0, also where a signal came when a run was completed; 1 after a
        reproduction that differs, 2 after an error that the user can put right, 130 after Ctrl-C,
        143 after SIGTERM, 129 after SIGHUP, which a closed terminal sends, and we ourselves once
        nobody reads the output.
    """
    wait_passively()
    with patient_output():
        return _main()


def _by_word(wants_traceback: bool) -> int | None:
    """The exit status of a command that the first word names; None where it names none."""
    try:
        with stopping():
            does = command(sys.argv[1:])
            return None if does is None else does(sys.argv[2:])
    except KeyboardInterrupt as interrupt:
        if wants_traceback:
            raise
        return _stopped(interrupt)
    except (UsageError, OSError) as error:
        if wants_traceback or not _ours(error):
            raise
        say_error(str(error))
        return FAILED


def _main() -> int:
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    if (status := _by_word(wants_traceback)) is not None:
        return status
    if {"-h", "--help"} & set(sys.argv[1:]):
        print_listing([conf_directory()], Console())
        print("\n--cfg job prints every setting instead of running; --hydra-help has all flags")
        return 0
    # Hydra takes the flag only where no override stands before it and another one after it.
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda a: a not in ("-m", "--multirun"))
    jobs = Jobs(sys.argv[1:], wants_traceback)
    _, unknown = read_flags(sys.argv[1:])
    if unknown:
        plain = unknown[0].lstrip("-").replace("-", "_").partition("=")[0]
        say_error(f"{unknown[0]}: there is no such flag; a setting has no dashes, {plain}=...")
        return FAILED
    if not sys.stderr.isatty():
        for package in ("HF_DATASETS", "HF_HUB"):
            os.environ.setdefault(f"{package}_DISABLE_PROGRESS_BARS", "1")
    run = hydra.main(version_base="1.3", config_path=str(conf_directory()), config_name="config")
    try:
        with _errors_from_hydra(), stopping():
            refuse_empty(sys.argv[1:], conf_directory())
            offer_probes(config_folders(sys.argv[1:]))
            sys.argv[1:], jobs.sweep = place(sys.argv[1:])
            on_a_run = _on_a_run(sys.argv[1:])
            if on_a_run is None:
                if jobs.sweep:
                    Ledger(jobs.sweep).begin()
                    go_through(jobs.sweep, run(jobs.run))
                else:
                    run(jobs.run)()
            elif not on_a_run(sys.argv[1:]):
                return DIFFERENT
    except KeyboardInterrupt as interrupt:
        if jobs.wants_traceback:
            raise
        return _interrupted(jobs, interrupt)
    except (UsageError, HydraException, OmegaConfBaseException, OSError) as error:
        # A file system that refuses Hydra's directories is the user's; ours say so themselves.
        if jobs.wants_traceback or not _ours(error):
            raise
        say_error(jobs.explain(error))
        return FAILED
    except ValueError as error:  # Optuna's, at the end of a search
        if jobs.sweep is None or "No trials are completed" not in str(error):
            raise
        say_error("the search has no result: every trial failed, see above")
        return FAILED
    return _ended(jobs)


def _stopped(interrupt: KeyboardInterrupt) -> int:
    """The exit status of a command that a signal has stopped."""
    # A launcher hands over the interrupt of a worker as what Python makes of it.
    stopped = interrupt if isinstance(interrupt, Stopped) else Stopped(signal.SIGINT)
    say(f"interrupted ({stopped}): {notes(interrupt) or 'nothing was recorded yet'}", "yellow")
    return stopped.exit_status


def _interrupted(jobs: Jobs, interrupt: KeyboardInterrupt) -> int:
    """The exit status after a signal, and what it left."""
    stopped = interrupt if isinstance(interrupt, Stopped) else Stopped(signal.SIGINT)
    if jobs.listing and stopped.hung_up:  # whoever reads a list has read enough
        return 0
    if jobs.sweep is None and (jobs.completed or COMPLETED in notes(interrupt)):
        say(f"{stopped} came when the run was completed", "yellow")
        return 0
    status = _stopped(interrupt)
    if jobs.sweep:
        say(f"go on with the sweep: {sweep_command(sys.argv[1:])}", "yellow")
    return status


def _ended(jobs: Jobs) -> int:
    """The exit status where nothing stopped the jobs, and what a sweep has made."""
    if jobs.sweep and (chosen := write_chosen(jobs.sweep)):
        print(chosen)
    failed = jobs.failures()
    if jobs.sweep and jobs.sweep.is_dir():
        print(f"a report on the sweep: python -m cl_bench report {shlex.quote(str(jobs.sweep))}")
    if failed:
        if jobs.sweep:
            numbers = ", ".join(map(str, failed))
            say_error(f"{len(failed)} of the jobs failed: {numbers}")
        return FAILED
    return _all_finished(jobs.sweep) if jobs.sweep else 0


def _all_finished(sweep: Path) -> int:
    """The exit status of a sweep in which nothing failed: of none that did nothing is it 0."""
    ledger = Ledger(sweep)
    unfinished = ledger.unfinished()
    if not ledger.latest():
        say_error("no job of the sweep was run: name a strategy and a stream, as for one run")
    elif unfinished:
        say_error(
            f"{len(unfinished)} of the jobs did not finish ({', '.join(unfinished)}): give the "
            "same command again, which goes on with them"
        )
    else:
        return 0
    return FAILED


def _on_a_run(arguments: Sequence[str]) -> Callable[[Sequence[str]], bool] | None:
    """What ``resume=``, ``reproduce=``, ``export=``, ... call; says if all is well."""
    words = [a.partition("=")[0] for a in arguments]
    if "reproduce" in words:
        return reproduce
    if "export" in words:
        return _export
    if "general" in words:
        return _general
    if "features" in words:
        return _extract
    if "plan" in words:
        return _plan
    return _resume if "resume" in words else None


def _export(arguments: Sequence[str]) -> bool:
    with deferred():
        from cl_bench.cli.export import export  # torch loads here

    export(arguments)
    return True


def _general(arguments: Sequence[str]) -> bool:
    with deferred():
        from cl_bench.cli.general import general  # torch loads here

    general(arguments)
    return True


def _extract(arguments: Sequence[str]) -> bool:
    with deferred():
        from cl_bench.cli.extract import extract

    extract(arguments)
    return True


def _plan(arguments: Sequence[str]) -> bool:
    with deferred():
        from cl_bench.cli.plan import plan  # torch loads here

    plan(arguments)
    return True


def _resume(arguments: Sequence[str]) -> bool:
    resume(arguments)
    return True


def _ours(error: Exception) -> bool:
    """Whether a message says it all; another ``OSError`` is somebody's mistake."""
    if isinstance(error, HydraException) or not isinstance(error, OSError):
        return True
    return error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.ENOTDIR)
