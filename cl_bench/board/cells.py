"""Cells: what was measured of a method on a protocol, with every run's record.

A cell is ``<protocol>/<method>.json`` and, in ``<method>/``, each run's ``results.jsonl``,
compressed. What the cell says of a run is checked against the record whenever it is read.
"""

import gzip
import hashlib
import json
import math
import shlex
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from cl_bench.contracts import UsageError
from cl_bench.metrics import summarise
from cl_bench.report.quantities import COSTS
from cl_bench.report.rows import Row
from cl_bench.report.study import PACKING
from cl_bench.report.trials import Trial
from cl_bench.tracking import Run, write_atomically
from cl_bench.tracking.files import RESULTS, read_json, read_text
from cl_bench.tracking.tables import Tables

SCORES = ("acc", "bwt", "forgetting", "learning_accuracy")

SPURIOUS = "spurious_fraction"
"""Share of what old tasks lost that is lost alignment only, where a probe measured it."""

MOST = 64 * 2**20
"""Bytes that a compressed record may hold."""


@dataclass(frozen=True)
class Record:
    """One run of a cell, or one trial.

    Attributes:
        seed: as run.
        order: of tasks; None where the protocol has one.
        scores: in [0, 1]; of a trial, ``acc`` on validation data.
        costs: by name, as in ``summary.json``.
        command: that ran it.
        commit: of the code, with a ``+`` where files had been changed.
        environment: versions and machine.
        file: the compressed record, from the protocol's folder; empty where none was kept.
        sha256: of the record before it was compressed.
        settings: of a trial, what was tried.
    """

    seed: int
    order: int | None
    scores: Mapping[str, float | None]
    costs: Mapping[str, float | None] = field(default_factory=dict)
    command: str = ""
    commit: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    file: str = ""
    sha256: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """A method on a protocol.

    Attributes:
        protocol: its name.
        method: its name.
        command: that makes all of its runs.
        date: of the last run.
        machine: what it ran on, in words.
        task_id_known: at test time.
        settings: that were chosen, or given.
        runs: a seed and an order each.
        trials: among which the settings were chosen.
        reference: published means and deviations in percent, with their source.
        source: whose measurement it is where records were not kept, a file of docs/results.
    """

    protocol: str
    method: str
    command: str
    date: str
    machine: str
    task_id_known: bool
    settings: Mapping[str, Any]
    runs: Sequence[Record]
    trials: Sequence[Record] = ()
    reference: Mapping[str, Any] | None = None
    source: str = ""

    @property
    def kept(self) -> bool:
        """Whether every run's record is there."""
        return all(run.file for run in self.runs)

    def values(self, score: str) -> np.ndarray:
        """One score of every run, in percent; NaN where it is not known."""
        found = [run.scores.get(score) for run in self.runs]
        return np.array([math.nan if v is None else 100 * v for v in found])

    def cost(self, name: str) -> float:
        """Mean over runs; NaN where one does not tell."""
        found = [run.costs.get(name) for run in self.runs]
        return math.nan if None in found else float(np.mean(np.array(found, dtype=float)))

    def by_pair(self) -> dict[tuple[int, int | None], float]:
        """ACC in percent by seed and order."""
        pairs = [(run.seed, run.order) for run in self.runs]
        return dict(zip(pairs, self.values("acc").tolist(), strict=True))


def write_cell(root: Path, cell: Cell, contents: Mapping[str, bytes]) -> Path:
    """Keep a cell, its runs' records first.

    Args:
        root: folder of all cells.
        cell: that is kept.
        contents: records by the names that its runs give them.
    """
    folder = root / cell.protocol
    (folder / cell.method).mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        # No time, no name: the same record is the same file.
        write_atomically(folder / name, gzip.compress(content, 9, mtime=0))
    told = asdict(cell)
    environments: list[Any] = []  # once each, not once a run
    for run in (*told["runs"], *told["trials"]):
        if run["environment"] not in environments:
            environments.append(run["environment"])
        run["environment"] = environments.index(run["environment"])
    told["environments"] = environments
    path = folder / f"{cell.method}.json"
    write_atomically(path, (json.dumps(told, indent=1) + "\n").encode())
    return path


def read_cells(root: Path) -> list[Cell]:
    """Every cell that is kept, checked against its records.

    Raises:
        UsageError: a file is damaged, or a cell does not say what its records say.
    """
    return [read_cell(path) for path in sorted(root.glob("*/*.json"))]


def read_cell(path: Path) -> Cell:
    """One cell; see :func:`read_cells`."""
    told = read_json(path)
    try:
        parts: dict[str, Any] = dict(told or {})
        environments = parts.pop("environments")
        for key in ("runs", "trials"):
            parts[key] = tuple(
                Record(**{**one, "environment": environments[one["environment"]]})
                for one in parts[key]
            )
        cell = Cell(**parts)
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise UsageError(f"{path}: not a cell of the board ({error})") from None
    if (cell.protocol, cell.method) != (path.parent.name, path.stem):
        raise UsageError(f"{path}: it is the cell {cell.protocol}/{cell.method}, misplaced")
    for run in cell.runs:
        found = record_scores(record_bytes(path.parent, run))
        for key in found.keys() | run.scores.keys():
            ours, told_score = found.get(key), run.scores.get(key)
            if ours is None or told_score is None:
                same = ours is told_score
            else:
                same = math.isclose(ours, told_score)
            if not same:
                raise UsageError(f"{path}: {run.file} has {key} {ours}, the cell says {told_score}")
    return cell


def record_scores(content: bytes) -> dict[str, float | None]:
    """What a run's record scores, in [0, 1]: of its matrix, and of its last look at alignment."""
    events = [json.loads(line) for line in content.splitlines()]
    found = summarise(_tables(events).matrix)
    scores = {key: None if math.isnan(found[key]) else found[key] for key in SCORES}
    looks = [e for e in events if e.get("probe") == "alignment" and not e.get("inside")]
    if looks:
        told = [v[SPURIOUS] for v in looks[-1]["values"].values() if v.get(SPURIOUS) is not None]
        scores[SPURIOUS] = float(np.mean(told)) if told else None
    return scores


def record_bytes(folder: Path, run: Record) -> bytes:
    """A run's ``results.jsonl``, as its hash says.

    Raises:
        UsageError: it is not there, or another one.
    """
    path = folder / run.file
    try:
        unpacked = zlib.decompressobj(31)
        content = unpacked.decompress(path.read_bytes(), MOST)
        whole = unpacked.eof
    except (OSError, zlib.error) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from None
    if not whole or hashlib.sha256(content).hexdigest() != run.sha256:
        raise UsageError(f"{path}: it is not the record that the cell was made of")
    return content


def record_tables(folder: Path, run: Record) -> Tables:
    """What a run's record comes to."""
    return _tables([json.loads(line) for line in record_bytes(folder, run).splitlines()])


def _tables(events: Sequence[Mapping[str, Any]]) -> Tables:
    evaluations = [event for event in events if event["event"] == "evaluation"]
    tables = Tables(list(dict.fromkeys(name for e in evaluations for name in e["scores"])))
    for event in events:
        tables.take(event)
    return tables


def as_row(root: Path, cell: Cell, bound: str | None) -> Row:
    """The cell as a row of a report, for its tables and figures; it needs the records."""
    trials = []
    for run in cell.runs:
        tables = record_tables(root / cell.protocol, run)
        facts = {"stream": cell.protocol, "strategy": cell.method, "seed": run.seed, "bound": bound}
        known = cell.task_id_known
        read = Run(root, tables.task_names, tables.matrix, known, "completed", facts,
                   tables.task_aware)  # fmt: skip
        trials.append(Trial(read, run.costs, {}, cell.reference, None, run.command, ""))
    return Row(cell.method, trials)


def record_of(trial: Trial, order: int | None, file: str, settings: Mapping[str, Any]) -> Record:
    """What a cell keeps of a run, from the run's directory."""
    directory = trial.run.directory
    environment = read_json(directory / "environment.json") or {}
    git = environment.get("git") or {}
    kept = {k: environment.get(k) for k in ("python", "platform", "packages")}
    content = read_text(directory / RESULTS).encode()
    return Record(
        seed=trial.seed,
        order=order,
        scores=record_scores(content),
        costs={k: trial.summary.get(k) for k in COSTS},
        command=_portable(trial.command),
        commit=f"{git.get('commit') or ''}{'+' if git.get('dirty') else ''}",
        environment=kept,
        file=file,
        sha256=hashlib.sha256(content).hexdigest(),
        settings=settings,
    )


def _portable(command: str) -> str:
    """A command without the folders of whoever ran it, which are nobody else's."""
    words = []
    for word in shlex.split(command):
        key, is_, value = word.partition("=")
        ours = is_ and key in PACKING
        words.append(f"{key}=/path/to/{PurePath(value).name}" if ours else word)
    return shlex.join(words)
