"""Sweeps: ``python -m cl_bench -m ...``; the same command again goes on with a stopped one.

A sweep has a directory that follows from its command line, or ``sweep_dir=...``; a job has one in
it that follows from the job's own overrides. What is finished there is skipped, what was killed is
resumed. ``jobs.jsonl`` in the sweep's directory says what became of every job; jobs in processes
of their own (``hydra/launcher=joblib``) leave what they print in ``logs``.
"""

import contextlib
import hashlib
import inspect
import math
import os
import re
import shlex
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf, open_dict

from cl_bench.cli.ledger import Ledger
from cl_bench.cli.threads import AUTO
from cl_bench.errors import UsageError

ROOT = "runs/sweeps"
WHOLE = ("+experiment=", "experiment=", "+protocol=", "protocol=")
"""What names a stream together with more."""
UNCOMPARED = ("run_dir", "logger", "selected")
"""Settings that may differ when a job is gone on with: they change where, not what."""


def place(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """The command line with the sweep's directory in Hydra's terms.

    Args:
        arguments: with the multirun flag first, if it is there.

    Returns:
        The command line, and the sweep's directory; None where it is no sweep.

    Raises:
        UsageError: ``sweep_dir=...`` without ``-m``, twice, or with a name Hydra could not read.
    """
    sweeps = arguments[:1] in (["-m"], ["--multirun"])
    named = [a.partition("=")[2] for a in arguments if a.lstrip("+").startswith("sweep_dir=")]
    rest = [a for a in arguments if not a.lstrip("+").startswith("sweep_dir=")]
    if not sweeps:
        if named:
            raise UsageError(
                f"sweep_dir={named[0]}: that is for several runs, -m ...; one run has run_dir=..."
            )
        return rest, None
    for argument in rest:
        if argument.startswith(("hydra.sweep.dir=", "hydra.sweep.subdir=")):
            raise UsageError(f"{argument}: name the sweep's directory with sweep_dir=...")
    if len(named) > 1:
        raise UsageError(f"sweep_dir stands there {len(named)} times: give one")
    directory = named[0].strip("'\"") if named else f"{ROOT}/{identity(rest[1:])}"
    if set("=,") & set(directory):
        raise UsageError(
            f"sweep_dir={directory}: a name with '=' or ',' could not be given back on the command "
            "line; use another one"
        )
    return [*rest, f"hydra.sweep.dir='{directory}'"], Path(directory)


def identity(arguments: Sequence[str]) -> str:
    """Name of a sweep: its streams, and a hash of everything but how it is launched."""
    words = sorted(a for a in arguments if not a.startswith(("hydra.launcher", "hydra/launcher")))
    streams = [a.partition("=")[2] for a in words if a.startswith(("+stream=", "stream="))]
    streams += [a.partition("=")[2] for a in words if a.startswith(WHOLE)]
    streams += [f"search-{a.partition('=')[2]}" for a in words if a.startswith("+search=")]
    name = re.sub(r"[^\w.+-]+", "-", "-".join(streams) or "sweep")[:40].strip("-")
    return f"{name}-{_hash(words)}"


def job_directory(sweep: Path, choices: Mapping[str, Any], seed: Any, task: Sequence[str]) -> Path:
    """``<stream>/<strategy>/seed<k>-<hash of the job's overrides>`` in the sweep's directory."""

    def plain(name: Any) -> str:
        return re.sub(r"[^\w.+-]+", "-", str(name))

    companions = choices.get("also") or []
    strategy = "+".join([str(choices.get("strategy", "strategy")), *map(str, companions)])
    own = f"seed{seed}-{_hash(sorted(task))}"
    return sweep / plain(choices.get("stream", "stream")) / plain(strategy) / plain(own)


def _hash(words: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:8]


class SweepJob:
    """One job of a sweep.

    Args:
        cfg: its configuration; gets the job's directory and the sweep's W&B group.
        arguments: the command line of the sweep.
        apart: whether it has a process of its own, whose output goes to a file.

    Attributes:
        directory: where its run is.
        ledger: of the sweep.
    """

    def __init__(self, cfg: DictConfig, arguments: Sequence[str], apart: bool) -> None:
        hydra = HydraConfig.get()
        sweep = Path(hydra.sweep.dir)
        task = list(hydra.overrides.task)
        self.cfg, self.apart, self.number = cfg, apart, int(hydra.job.num)
        self.ledger = Ledger(sweep, _total(hydra, arguments))
        given = cfg.run_dir
        self.directory = (
            job_directory(sweep, _choices(cfg, hydra), cfg.seed, task)
            if given is None
            else Path(given)
        )
        inside = self.directory.is_relative_to(sweep)
        self.name = str(self.directory.relative_to(sweep) if inside else self.directory)
        with open_dict(cfg):
            cfg.run_dir = str(self.directory)
            if "logger" in cfg and "group" in cfg.logger and cfg.logger.group is None:
                cfg.logger.group = sweep.name

    @property
    def has_failed(self) -> bool:
        """Whether it failed since the command was issued: once is enough."""
        return self.ledger.latest().get(self.name, {}).get("event") == "failed"

    def run(self, fresh: Callable[[], float], go_on: Callable[[Path], float]) -> float:
        """Skip, resume or run it; whatever it raises is noted, and raised.

        Args:
            fresh: runs the job, and returns its score.
            go_on: the same for a job that was stopped, from its directory.
        """
        from cl_bench.tracking.files import CONFIG

        begun = time.monotonic()
        exists = (self.directory / CONFIG).is_file()
        try:
            if exists:
                self._require_same_settings()
            if exists and (before := self._finished_before()) is not None:
                self.ledger.write("skipped", self.name)
                self._say(f"{self.name}  was finished before")
                return before
            self.ledger.write("started", self.name, number=self.number)
            self._say(f"{self.name}  {'goes on' if exists else 'begins'}")
            with self._output():
                reached = go_on(self.directory) if exists else fresh()
        except BaseException as error:
            if self.cfg.search.enabled and type(error).__name__ == "DivergedError":
                # A result like any other: the search has to keep away from there.
                self.ledger.write("finished", self.name, seconds=0.0, whole=False)
                self._say(f"{self.name}  diverged, which counts as ACC 0")
                return 0.0
            how = "failed" if isinstance(error, Exception) else "interrupted"
            with contextlib.suppress(UsageError):  # a full disk must not hide what came before
                self.ledger.write(how, self.name, number=self.number, error=f"{error}")
            self._say(f"{self.name}  {how}")
            raise
        seconds = time.monotonic() - begun
        self.ledger.write("finished", self.name, seconds=seconds, whole=not exists)
        self._say(f"{self.name}  ACC {100 * reached:.1f} %  {seconds:.0f} s")
        return reached

    def _finished_before(self) -> float | None:
        """The score of a run that is finished; None where it has to go on."""
        from cl_bench.tracking.reading import is_finished

        try:
            return score(self.directory) if is_finished(self.directory) else None
        except UsageError as damage:
            damage.add_note(
                "where there is no copy, run the job again: "
                f"python -m cl_bench resume={shlex.quote(str(self.directory))} from=start"
            )
            raise

    def _require_same_settings(self) -> None:
        from cl_bench.tracking.reading import read_config

        then = _compared(read_config(self.directory))
        plain = OmegaConf.to_container(self.cfg, resolve=True)
        now = _compared(plain)
        changed = sorted(k for k in {*then, *now} if then.get(k) != now.get(k))
        changed = [k for k in changed if k in then or not _by_default(plain, k, now[k])]
        if changed:
            key = changed[0]
            more = f" (and {len(changed) - 1} more)" if changed[1:] else ""
            raise UsageError(
                f"{self.directory} was run with {key}={then.get(key)}, which is now "
                f"{now.get(key)}{more}: give another sweep_dir=..., or delete that directory"
            )

    @contextlib.contextmanager
    def _output(self) -> Iterator[None]:
        if not self.apart:
            yield
            return
        path = self.ledger.directory / "logs" / f"{self.name.replace(os.sep, '-')}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            path.open("a", buffering=1) as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            try:
                yield
            except Exception:
                traceback.print_exc()
                raise

    def _say(self, what: str) -> None:
        print(f"{what}\n{self.ledger.standing()}", flush=True)


def command(arguments: Sequence[str]) -> str:
    """The command of the sweep, for somebody to issue it again."""
    words = [a for a in arguments if not a.startswith("hydra.sweep.dir=")]
    return " ".join(["python -m cl_bench", *map(shlex.quote, words)])


def _choices(cfg: DictConfig, hydra: Any) -> dict[str, Any]:
    return {**dict(hydra.runtime.choices), "also": list(cfg.get("also") or {}) or None}


def _total(hydra: Any, arguments: Sequence[str]) -> int:
    """How many jobs the sweep has."""
    if "n_trials" in hydra.sweeper:
        return int(hydra.sweeper.n_trials)
    params = [f"{k}={v}" for k, v in (hydra.sweeper.get("params") or {}).items()]
    given = [a for a in arguments if "=" in a and not a.startswith("hydra")]
    overrides = OverridesParser.create().parse_overrides([*params, *given])
    values = {
        o.get_key_element(): len(list(o.sweep_string_iterator())) if o.is_sweep_override() else 1
        for o in overrides
    }
    return math.prod(values.values())


def _compared(plain: Any) -> dict[str, Any]:
    """Resolved settings by their dotted names."""
    from cl_bench.tracking.renamed import without_idle

    settings = without_idle({k: v for k, v in plain.items() if k not in UNCOMPARED})
    found = dict(flat(settings))
    for name in ("trainer.threads", "trainer.masters"):
        if found.get(name) == AUTO:  # what runs did that have no such setting
            del found[name]
    return found


def _by_default(plain: Any, name: str, value: Any) -> bool:
    """Whether an option has its own default: versions without that option did the same."""
    *path, option = name.split(".")
    for key in path:
        plain = plain[key]
    if "_target_" not in plain:
        return False
    known = inspect.signature(get_object(plain["_target_"])).parameters.get(option)
    return known is not None and known.default == value


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dictionaries, by their dotted names."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def score(directory: Path) -> float:
    """The final average accuracy of a finished run; NaN where it has none.

    Raises:
        UsageError: a file of it is damaged.
    """
    from cl_bench.tracking.files import PUT_BACK, SUMMARY, read_json
    from cl_bench.tracking.verify import require_numbers, verified

    verified(directory)
    summary = read_json(directory / SUMMARY)
    if summary is None:
        raise UsageError(f"{directory / SUMMARY} is missing; {PUT_BACK}")
    require_numbers(summary, ("acc",), directory / SUMMARY)
    return float("nan") if summary.get("acc") is None else float(summary["acc"])
