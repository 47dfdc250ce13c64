"""Run a random run of a random cell again, and compare."""

import math
import random
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from cl_bench.board.cells import Cell, Record, record_tables
from cl_bench.board.protocol import Protocol
from cl_bench.board.running import PROGRAM, require_declared
from cl_bench.contracts import UsageError
from cl_bench.report.trials import read_trial
from cl_bench.tracking.environment import describe_environment

LEAST = 0.5
"""Points that an interval is wide on either side, at least."""


@dataclass(frozen=True)
class Check:
    """How a run that was run again compares.

    Attributes:
        what: which it is.
        identical: whether every entry of its accuracy matrix is the same number.
        versions: what differs between then and now, in words; empty where nothing does.
        low: end of the interval of the cell's ACC in percent, for one more run.
        high: its other end.
        acc: of the new run.
    """

    what: str
    identical: bool
    versions: list[str]
    low: float
    high: float
    acc: float

    @property
    def holds(self) -> bool:
        """The same bits on the same versions, else within the cell's interval."""
        return self.identical or (bool(self.versions) and self.low <= self.acc <= self.high)

    @property
    def text(self) -> str:
        """In words."""
        if self.identical:
            return f"{self.what}: the same bits"
        place = "within" if self.low <= self.acc <= self.high else "OUTSIDE"
        said = f"{self.what}: ACC {self.acc:.2f}, {place} {self.low:.2f} to {self.high:.2f}"
        if not self.versions:
            return f"{said}, and other bits on the same versions"
        return f"{said}; {'; '.join(self.versions)}"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Where one more run lies 19 times of 20, as Student's distribution has it, in percent."""
    n = len(values)
    mean = float(np.mean(values))
    half = 0.0
    if n > 1:
        spread = float(np.std(values, ddof=1))
        half = float(stats.t.ppf(0.975, n - 1)) * spread * math.sqrt(1 + 1 / n)
    return mean - max(half, LEAST), mean + max(half, LEAST)


def pick(cells: Sequence[Cell], draw: random.Random) -> tuple[Cell, Record]:
    """A run at random, of a cell at random.

    Raises:
        UsageError: no cell has records.
    """
    kept = [cell for cell in cells if cell.kept]
    if not kept:
        raise UsageError("no cell with records is here: python -m cl_bench board run makes them")
    cell = draw.choice(kept)
    return cell, draw.choice(list(cell.runs))


def verify(protocol: Protocol, cell: Cell, run: Record, root: Path, data: str | None) -> Check:
    """Run it again, in a process of its own, and compare with its record.

    Raises:
        UsageError: it failed.
    """
    method = protocol.methods[cell.method]
    setting = protocol.orders.setting
    own = [f"{setting}={run.order}"] if setting else []
    with tempfile.TemporaryDirectory() as folder:
        again = Path(folder) / "again"
        words = [*protocol.words(method, cell.settings, data), f"seed={run.seed}", *own]
        command = [*PROGRAM, *words, "logger.mode=disabled", f"run_dir={again}"]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            raise UsageError(f"{cell.protocol}/{cell.method}: the run failed")
        trial = read_trial(again, [])
        require_declared(protocol, method, cell.settings, trial)
        matrix = trial.run.matrix
    before = record_tables(root / cell.protocol, run).matrix
    low, high = interval(cell.values("acc").tolist())
    order = "" if run.order is None else f", order {run.order}"
    return Check(
        what=f"{cell.protocol}/{cell.method}, seed {run.seed}{order}",
        identical=bool(np.array_equal(before, matrix, equal_nan=True)),
        versions=list(_changes(run)),
        low=low,
        high=high,
        acc=100 * trial.metrics["acc"],
    )


def _changes(run: Record) -> list[str]:
    """What is another now: versions, platform, and the commit."""
    now = describe_environment()
    then = run.environment
    found = [
        f"{key} {then.get(key)} -> {now[key]}"
        for key in ("python", "platform")
        if then.get(key) != now[key]
    ]
    packages = then.get("packages") or {}
    found += [
        f"{name} {packages.get(name)} -> {version}"
        for name, version in now["packages"].items()
        if packages.get(name) != version
    ]
    commit = str(now["git"]["commit"] or "")
    if run.commit.rstrip("+") != commit:
        found.append(f"commit {run.commit[:9]} -> {commit[:9]}")
    return found
