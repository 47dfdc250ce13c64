"""What became of the jobs of a sweep, and how long the rest will take: ``jobs.jsonl``."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_bench.errors import UsageError
from cl_bench.parallel.processes import alive, ourselves

JOBS = "jobs.jsonl"

DONE = ("finished", "skipped")

FACTS = {"event", "job", "time", "process", "host"}
"""What every line of ``jobs.jsonl`` tells."""


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


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
