"""The jobs of a command line: one run, or the runs of a sweep."""

import difflib
import os
import shlex
import traceback
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from cl_bench.cli.explain import explain, refuse_lists, searched
from cl_bench.cli.folders import conf_directory, search_path
from cl_bench.cli.ledger import Ledger
from cl_bench.cli.listing import print_listing
from cl_bench.cli.messages import notes, say_error
from cl_bench.cli.output import patient_output
from cl_bench.cli.resume import resume
from cl_bench.cli.search import apply_selection
from cl_bench.cli.signals import deferred
from cl_bench.cli.sweep import SweepJob, score
from cl_bench.cli.threads import AUTO, chosen, computing_with
from cl_bench.errors import UsageError
from cl_bench.parallel.processes import end_with_parent, ourselves


def read_flags(arguments: Sequence[str]) -> tuple[Namespace, list[str]]:
    """Hydra's flags and the overrides of a command line, and the flags that Hydra does not know."""
    return get_args_parser().parse_known_args(arguments)


def config_folders(arguments: Sequence[str]) -> list[Path]:
    """Folders with configs that a command line names, and ours, those that count most first."""
    given, _ = read_flags(arguments)
    theirs = [given.config_dir] if given.config_dir else []
    theirs += searched(given.overrides)
    return [*(Path(folder).absolute() for folder in theirs), conf_directory()]


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
            print_listing(search_path(), Console())
            return None
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            return self._run_in_sweep(cfg)
        try:
            return self._run_fresh(cfg)
        except (UsageError, OmegaConfBaseException) as error:
            if self.wants_traceback:
                raise
            say_error(self.explain(error))
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
            message = (
                self.explain(error)
                if known
                else f"{type(error).__name__}: {error}\n{notes(error)}".strip()
            )
            say_error(f"job {job.job.num} ({' '.join(job.overrides.task)}) failed: {message}")
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
        given, _ = read_flags(self._arguments)
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
            return f"{error}\n{notes(error)}".strip()
        given, _ = read_flags(self._arguments)
        return explain(error, given.overrides, config_folders(self._arguments))


def quote(word: str) -> str:
    """For the shell; in double quotes where that reads better."""
    simple = "'" in word and not set('"$`\\!') & set(word)
    return f'"{word}"' if simple else shlex.quote(word)
