"""The entry point: compose a configuration with Hydra, check it, run it."""

import difflib
import errno
import importlib.util
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from cl_bench.cli.explain import explain, refuse_empty, refuse_lists, searched
from cl_bench.cli.listing import print_listing
from cl_bench.cli.output import patient_output
from cl_bench.cli.reproduce import reproduce
from cl_bench.cli.resume import resume
from cl_bench.cli.search import apply_selection, write_chosen
from cl_bench.cli.signals import deferred, stopping
from cl_bench.cli.sweep import Ledger, SweepJob, place, score
from cl_bench.cli.sweep import command as sweep_command
from cl_bench.cli.threads import AUTO, chosen, computing_with, wait_passively
from cl_bench.cli.workers import go_through
from cl_bench.ends import COMPLETED, Stopped
from cl_bench.errors import UsageError, printable
from cl_bench.parallel.processes import end_with_parent, ourselves

DIFFERENT = 1
"""Exit status of a reproduction that came to something else."""

FAILED = 2
"""Exit status after an error that the user can put right."""


def conf_directory() -> Path:
    """Where our configs are: in the wheel inside the package, in a checkout beside it."""
    package = Path(__file__).parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


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


def _main() -> int:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print_listing([conf_directory()], Console())
        print("\n--cfg job prints every setting instead of running; --hydra-help has all flags")
        return 0
    # Hydra takes the flag only where no override stands before it and another one after it.
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda a: a not in ("-m", "--multirun"))
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    jobs = Jobs(sys.argv[1:], wants_traceback)
    _, unknown = get_args_parser().parse_known_args(sys.argv[1:])
    if unknown:
        plain = unknown[0].lstrip("-").replace("-", "_").partition("=")[0]
        _say_error(f"{unknown[0]}: there is no such flag; a setting has no dashes, {plain}=...")
        return FAILED
    if not sys.stderr.isatty():
        for package in ("HF_DATASETS", "HF_HUB"):
            os.environ.setdefault(f"{package}_DISABLE_PROGRESS_BARS", "1")
    run = hydra.main(version_base="1.3", config_path=str(conf_directory()), config_name="config")
    try:
        with _errors_from_hydra(), stopping():
            require_own_tasks_package()
            refuse_empty(sys.argv[1:], conf_directory())
            sys.argv[1:], jobs.sweep = place(sys.argv[1:])
            command = _on_a_run(sys.argv[1:])
            if command is None:
                if jobs.sweep:
                    Ledger(jobs.sweep).begin()
                    go_through(jobs.sweep, run(jobs.run))
                else:
                    run(jobs.run)()
            elif not command(sys.argv[1:]):
                return DIFFERENT
    except KeyboardInterrupt as interrupt:
        if jobs.wants_traceback:
            raise
        # A launcher hands over the interrupt of a worker as what Python makes of it.
        stopped = interrupt if isinstance(interrupt, Stopped) else Stopped(signal.SIGINT)
        if jobs.listing and stopped.hung_up:  # whoever reads a list has read enough
            return 0
        if jobs.sweep is None and (jobs.completed or COMPLETED in _notes(interrupt)):
            _say(f"{stopped} came when the run was completed", "yellow")
            return 0
        notes = _notes(interrupt) or "nothing was recorded yet"
        _say(f"interrupted ({stopped}): {notes}", "yellow")
        if jobs.sweep:
            _say(f"go on with the sweep: {sweep_command(sys.argv[1:])}", "yellow")
        return stopped.exit_status
    except (UsageError, HydraException, OmegaConfBaseException, OSError) as error:
        # A file system that refuses Hydra's directories is the user's; ours say so themselves.
        if jobs.wants_traceback or not _ours(error):
            raise
        _say_error(jobs.explain(error))
        return FAILED
    except ValueError as error:  # Optuna's, at the end of a search
        if jobs.sweep is None or "No trials are completed" not in str(error):
            raise
        _say_error("the search has no result: every trial failed, see above")
        return FAILED
    if jobs.sweep and (chosen := write_chosen(jobs.sweep)):
        print(chosen)
    failed = jobs.failures()
    if jobs.sweep and jobs.sweep.is_dir():
        print(f"a report on the sweep: python -m cl_bench.report {shlex.quote(str(jobs.sweep))}")
    if failed:
        if jobs.sweep:
            numbers = ", ".join(map(str, failed))
            _say_error(f"{len(failed)} of the jobs failed: {numbers}")
        return FAILED
    return _all_finished(jobs.sweep) if jobs.sweep else 0


def _all_finished(sweep: Path) -> int:
    """The exit status of a sweep in which nothing failed: of none that did nothing is it 0."""
    ledger = Ledger(sweep)
    unfinished = ledger.unfinished()
    if not ledger.latest():
        _say_error("no job of the sweep was run: name a strategy and a stream, as for one run")
    elif unfinished:
        _say_error(
            f"{len(unfinished)} of the jobs did not finish ({', '.join(unfinished)}): give the "
            "same command again, which goes on with them"
        )
    else:
        return 0
    return FAILED


def _on_a_run(arguments: Sequence[str]) -> Callable[[Sequence[str]], bool] | None:
    """What ``resume=``, ``reproduce=`` or ``export=`` calls, which tells whether all is well."""
    words = [a.partition("=")[0] for a in arguments]
    if "reproduce" in words:
        return reproduce
    if "export" in words:
        return _export
    return _resume if "resume" in words else None


def _export(arguments: Sequence[str]) -> bool:
    with deferred():
        from cl_bench.cli.export import export  # torch loads here

    export(arguments)
    return True


def _resume(arguments: Sequence[str]) -> bool:
    resume(arguments)
    return True


class Jobs:
    """What Hydra calls for every job of a command line.

    Args:
        arguments: the command line.
        wants_traceback: raise errors instead of printing them.

    Attributes:
        failed: numbers of the jobs that ended with an error, as far as this process knows.
        sweep: the directory of the sweep; None for one run.
        listing: whether what there is to run was listed instead.
        completed: whether a run has come to its end.
    """

    def __init__(self, arguments: Sequence[str], wants_traceback: bool) -> None:
        self.wants_traceback = wants_traceback
        self.failed: list[int] = []
        self.sweep: Path | None = None
        # Launchers may run jobs in processes that have another command line, and no way to tell
        # this object what failed: the sweep's ledger does.
        self._starter = ourselves()
        self._arguments = list(arguments)
        self._told = False
        self.listing = self.completed = False

    def run(self, cfg: DictConfig) -> float | None:
        """Run one job; returns the final average accuracy, which sweepers maximise."""
        if not {"strategy", "stream"} & set(cfg):
            self.listing = True
            print_listing(_search_path(), Console())
            return None
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            return self._run_in_sweep(cfg)
        try:
            return self._run_fresh(cfg)
        except (UsageError, OmegaConfBaseException) as error:
            if self.wants_traceback:
                raise
            _say_error(f"{error}\n{_notes(error)}".strip())
            self.failed.append(0)
            return float("nan")

    def _run_fresh(self, cfg: DictConfig) -> float:
        job = HydraConfig.get()
        self._check(cfg, list(job.overrides.task))
        apply_selection(cfg, job.runtime.choices, job.overrides.task)
        with deferred():
            from cl_bench.cli.run import run_config  # torch and lightning load here
            from cl_bench.experiment import processes

        setting = cfg.trainer.get("threads", AUTO)
        threads = chosen(setting, processes({**cfg.trainer, "num_nodes": 1}))
        says = []
        if setting == AUTO and threads is not None and not self._told:
            self._told = True
            policy = os.environ.get("OMP_WAIT_POLICY", "").lower()
            waiting = ", which sleep while they wait" if policy == "passive" else ""
            says.append(f"threads: {threads}{waiting} (trainer.threads=auto)")
        words, named = list(job.overrides.task), dict(job.runtime.choices)
        with computing_with(threads):
            result = run_config(cfg, self.command(), named, notes=says, words=words)
        self.completed = True
        return float(result.summary["acc"])

    def _run_in_sweep(self, cfg: DictConfig) -> float | None:
        """A job that fails, however it does, stops no other."""
        job = HydraConfig.get()
        if os.getpid() == self._starter["process"]:
            return self._run_job(cfg, job, apart=False)
        end_with_parent(self._starter)
        with patient_output():
            return self._run_job(cfg, job, apart=True)

    def _run_job(self, cfg: DictConfig, job: Any, apart: bool) -> float | None:
        try:
            # Before the sweep gives every job a directory of its own.
            self._refuse_one_directory(cfg, list(job.overrides.task))
            sweep_job = SweepJob(cfg, self._arguments, apart)
            if sweep_job.has_failed:
                return None

            def go_on(directory: Path) -> float:
                resume([f"resume={directory}"], composed=True)
                return score(directory)

            return sweep_job.run(lambda: self._run_fresh(cfg), go_on)
        except Exception as error:
            known = isinstance(error, UsageError | OmegaConfBaseException)
            if self.wants_traceback or not known:
                traceback.print_exc()
            kind = "" if known else f"{type(error).__name__}: "
            message = f"{kind}{error}\n{_notes(error)}".strip()
            _say_error(f"job {job.job.num} ({' '.join(job.overrides.task)}) failed: {message}")
            self.failed.append(job.job.num)
            return None  # NaN would end a search by Optuna

    def failures(self) -> list[int]:
        """Numbers of the jobs that failed, in whatever process."""
        told = Ledger(self.sweep).failed() if self.sweep else []
        return sorted({*self.failed, *(int(e["number"]) for e in told)})

    def _check(self, cfg: DictConfig, overrides: Sequence[str]) -> None:
        refused = refuse_lists(overrides)
        if refused:
            raise UsageError(refused)
        for group, example in (("strategy", "gpm"), ("stream", "permuted_digits")):
            if group not in cfg:
                for word in overrides:
                    key, _, value = word.lstrip("+").partition("=")
                    if difflib.get_close_matches(key, [group]):
                        raise UsageError(
                            f"{word}: there is no such setting. Did you mean +{group}={value}?"
                        )
                raise UsageError(
                    f"no {group} is named: add one, for example +{group}={example} "
                    "(python -m cl_bench lists them)"
                )

    def _refuse_one_directory(self, cfg: DictConfig, overrides: Sequence[str]) -> None:
        if f"run_dir={cfg.run_dir}" in overrides:
            raise UsageError(
                f"run_dir={cfg.run_dir} would be the directory of every job: leave it out, or "
                f"number it, 'run_dir={cfg.run_dir}/${{hydra:job.num}}'"
            )

    def command(self) -> str:
        """The command that runs exactly the current job again."""
        given, _ = get_args_parser().parse_known_args(self._arguments)
        flags = [
            text
            for option in ("config_path", "config_name", "config_dir")
            if (value := getattr(given, option)) is not None
            for text in (f"--{option.replace('_', '-')}", value)
        ]
        overrides = HydraConfig.get().overrides
        paths = [o for o in overrides.hydra if o.lstrip("+").startswith("hydra.searchpath=")]
        words = [*flags, *paths, *overrides.task]
        return " ".join(["python -m cl_bench", *map(quote, words)])

    def explain(self, error: Exception) -> str:
        """What to say about an error that came before or around the jobs."""
        if isinstance(error, OSError) and error.filename is not None:
            return (
                f"cannot use {error.filename} ({error.strerror}): start in a directory, and name "
                "files, where you may read and write"
            )
        if isinstance(error, UsageError):
            return f"{error}\n{_notes(error)}".strip()
        given, _ = get_args_parser().parse_known_args(self._arguments)
        theirs = [given.config_dir] if given.config_dir else []
        theirs += searched(given.overrides)
        folders = [Path(folder).absolute() for folder in theirs]
        return explain(error, given.overrides, [*folders, conf_directory()])


def quote(word: str) -> str:
    """For the shell; in double quotes where that reads better."""
    simple = "'" in word and not set('"$`\\!') & set(word)
    return f'"{word}"' if simple else shlex.quote(word)


def require_own_tasks_package() -> None:
    """Raise :class:`UsageError` if somebody else's ``tasks`` would be imported instead of ours."""
    ours = Path(__file__).resolve().parents[2] / "tasks"
    spec = importlib.util.find_spec("tasks")
    origin = None if spec is None or spec.origin is None else Path(spec.origin).resolve()
    if origin is None or origin.parent != ours:
        raise UsageError(
            f"the package 'tasks' of cl_bench ({ours}) is shadowed by {origin}: rename that file "
            "or folder, or start from another directory (cl-bench ... instead of "
            "python -m cl_bench keeps the current directory off the import path)"
        )


def _search_path() -> list[Path]:
    """Folders on Hydra's search path."""
    loader: Any = GlobalHydra.instance().config_loader()
    paths = [entry.path for entry in loader.get_search_path().get_path()]
    # The file system's paths only; Hydra's own packages have nothing to list.
    plain = [p.removeprefix("file://") for p in (*paths, *HydraConfig.get().searchpath) if p]
    return [Path(p) for p in plain if "://" not in p]


def _ours(error: Exception) -> bool:
    """Whether a message says it all; another ``OSError`` is somebody's mistake."""
    if isinstance(error, HydraException) or not isinstance(error, OSError):
        return True
    return error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.ENOTDIR)


def _notes(error: BaseException) -> str:
    return "; ".join(getattr(error, "__notes__", []))


def _say_error(message: str) -> None:
    _say(f"error: {message}", "bold red")


def _say(message: str, style: str) -> None:
    sys.stdout.flush()
    message = printable(message)
    Console(stderr=True).print(message, style=style, highlight=False, markup=False, soft_wrap=True)
