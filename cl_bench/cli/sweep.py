"""Sweeps: ``python -m cl_bench -m ...``; the same command again goes on with a stopped one.

A sweep has a directory that follows from its command line, or ``sweep_dir=...``; a job has one in
it that follows from the job's own overrides. What is finished there is skipped, what was killed is
resumed. ``jobs.jsonl`` in the sweep's directory says what became of every job; jobs in processes
of their own (``hydra/launcher=joblib``) leave what they print in ``logs``.
"""

import contextlib
import hashlib
import json
import os
import re
import shlex
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from cl_bench.cli.threads import AUTO
from cl_bench.errors import UsageError
from cl_bench.parallel.processes import alive, ourselves

JOBS = "jobs.jsonl"
ROOT = "runs/sweeps"
UNCOMPARED = ("run_dir", "logger", "selected")
"""Settings that may differ when a job is gone on with: they change where, not what."""

DONE = ("finished", "skipped")

FACTS = {"event", "job", "time", "process", "host"}
"""What every line of ``jobs.jsonl`` tells."""


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
    streams += [a.partition("=")[2] for a in words if a.startswith(("+experiment=", "experiment="))]
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


@dataclass(frozen=True)
class Ledger:
    """What became of the jobs of a sweep, a line each; several processes write to it.

    Attributes:
        directory: of the sweep.
        total: how many jobs there are.
    """

    directory: Path
    total: int = 0

    def write(self, event: str, job: str, **facts: Any) -> None:
        """Note that something happened to a job."""
        self.directory.mkdir(parents=True, exist_ok=True)
        line = {"event": event, "job": job, "time": time.time(), **ourselves(), **facts}
        try:
            with (self.directory / JOBS).open("a+b") as file:
                # Half a line of a killed process, or of a full disk, must not swallow this one.
                if file.seek(0, os.SEEK_END):
                    file.seek(-1, os.SEEK_END)
                    file.write(b"" if file.read() == b"\n" else b"\n")
                file.write(f"{json.dumps(line)}\n".encode())
        except OSError as error:
            raise UsageError(
                f"cannot write {self.directory / JOBS} ({error.strerror or error}): free some "
                "space, or give sweep_dir=... where you may write; what jobs recorded stays"
            ) from error

    def begin(self) -> None:
        """The command was issued (again): what failed or was stopped before gets another chance."""
        if (self.directory / JOBS).exists():
            self.write("begin", "")

    def latest(self) -> dict[str, dict[str, Any]]:
        """The last thing that happened to every job, by its directory in the sweep."""
        found: dict[str, dict[str, Any]] = {}
        for event in self._events():
            if event["event"] == "begin":
                found = {k: e for k, e in found.items() if e["event"] in DONE}
            else:
                found[event["job"]] = event
        return found

    def failed(self) -> list[dict[str, Any]]:
        """The jobs that failed since the command was issued, as :meth:`latest` has them."""
        return [e for e in self.latest().values() if e["event"] == "failed"]

    def unfinished(self) -> list[str]:
        """The jobs that began, neither ended nor failed, and nobody is at any more."""
        latest = self.latest().items()
        left = [(job, e) for job, e in latest if e["event"] not in (*DONE, "failed")]
        return [job for job, e in left if e["event"] != "started" or not alive(e)]

    def processes(self) -> set[int]:
        """Those on this host that are at a job, as far as was told."""
        latest, host = self.latest().values(), socket.gethostname()
        return {e["process"] for e in latest if e["event"] == "started" and e["host"] == host}

    def size(self) -> int:
        """Bytes written so far."""
        try:
            return (self.directory / JOBS).stat().st_size
        except OSError:
            return 0

    def _events(self) -> Iterator[dict[str, Any]]:
        with contextlib.suppress(FileNotFoundError):
            for line in (self.directory / JOBS).read_bytes().splitlines():
                with contextlib.suppress(ValueError, RecursionError):
                    event = json.loads(line)
                    # Anything else is half a line of a killed process, or of a full disk.
                    if isinstance(event, dict) and event.keys() >= FACTS:
                        yield event

    def standing(self) -> str:
        """One line: how many jobs are done, running and failed, and the time left."""
        latest = self.latest()
        done = sum(e["event"] in DONE for e in latest.values())
        failed = sum(e["event"] == "failed" for e in latest.values())
        running = [e for e in latest.values() if e["event"] == "started" and alive(e)]
        facts = [f"{done} of {self.total} jobs done", f"{len(running)} running", f"{failed} failed"]
        left = self._seconds_left(done + failed, running)
        return "  ".join(["sweep:", *facts, *([f"{_clock(left)} left"] if left else [])])

    def _seconds_left(self, ended: int, running: Sequence[Mapping[str, Any]]) -> float | None:
        """From what jobs took so far; None before one has ended."""
        took = [e["seconds"] for e in self._events() if e["event"] == "finished" and e["whole"]]
        waiting = max(0, self.total - ended - len(running))
        if not took or not (waiting or running):
            return None
        mean: float = sum(took) / len(took)
        rest: float = sum(max(0.0, mean - (time.time() - e["time"])) for e in running)
        return (rest + waiting * mean) / max(1, len(running))


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
        now = _compared(OmegaConf.to_container(self.cfg, resolve=True))
        changed = sorted(k for k in {*then, *now} if then.get(k) != now.get(k))
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
    return sum(map(len, BasicSweeper.split_arguments(overrides, None)))


def _compared(plain: Any) -> dict[str, Any]:
    """Resolved settings by their dotted names."""
    found = dict(flat({k: v for k, v in plain.items() if k not in UNCOMPARED}))
    if found.get("trainer.threads") == AUTO:  # what runs did that have no such setting
        del found["trainer.threads"]
    return found


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


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
