"""Runs put side by side: which belong together, their mean and spread over seeds, what they cost.

Runs that differ in their seed alone make a row. Rows can be compared where the stream is the same
and what is known at test time is: they make a block.
"""

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from cl_bench.contracts import UsageError
from cl_bench.errors import printable
from cl_bench.metrics import Matrix, intransigence, summarise, tasks_learned
from cl_bench.report.escape import shown
from cl_bench.tracking import Run, read_results, read_run
from cl_bench.tracking.aside import SUPERSEDED
from cl_bench.tracking.files import (
    COMMAND,
    LAYERS,
    MATRIX,
    RESULTS,
    SUMMARY,
    read_json,
    read_text,
)
from cl_bench.tracking.journal import read_journal
from cl_bench.tracking.reading import read_config
from cl_bench.tracking.verify import require_numbers, verify_weights

OLDER = {"finetune": "lower", "joint": "upper"}
"""Bounds by name, in runs that were recorded before strategies said it themselves."""
"""Strategies that others lie between: shown with them, never the best of them."""

METRICS = {
    "acc": ("ACC", 1),
    "bwt": ("BWT", 1),
    "forgetting": ("forgetting", -1),
    "learning_accuracy": ("LA", 1),
    "average_incremental_accuracy": ("AIA", 1),
    "fwt": ("FWT", 1),
    "intransigence": ("INT", -1),
    "task_aware_acc": ("ACC told", 1),
}
"""Name, and whether more (1) or less (-1) is better."""

COSTS = {
    "optimizer_steps": "optimizer steps",
    "forward_samples": "samples forward",
    "backward_samples": "samples backward",
    "wall_seconds": "time",
    "peak_memory_bytes": "peak memory",
    "strategy_bytes": "strategy memory",
    "inference_overhead": "inference overhead",
}

TOLERANCE = 0.10
"""Rows whose costs differ by more than this share are not compared without a warning."""

INCIDENTAL = (
    "seed",
    "run_dir",
    "logger",
    "reference",
    "checkpoint",
    "num_workers",
    "selected",
    "search",
)
"""Settings that do not make another row."""

PACKING = ("stream.data_dir", "stream.cache_dir")


@dataclass(frozen=True)
class Trial:
    """One run, with all its files say.

    Attributes:
        run: matrix and facts.
        summary: of ``summary.json``.
        settings: resolved configuration by dotted names; empty if the run has none.
        reference: published numbers that its configuration names.
        selection: how its hyperparameters were chosen, if they were.
        command: the command line.
    """

    run: Run
    summary: Mapping[str, Any]
    settings: Mapping[str, Any]
    reference: Mapping[str, Any] | None
    selection: Mapping[str, Any] | None
    command: str

    @property
    def seed(self) -> int:
        """As recorded; 0 for runs that have none."""
        return int(self.run.facts.get("seed") or 0)

    @property
    def strategy(self) -> str:
        """As recorded."""
        return str(self.run.facts.get("strategy", self.run.directory.name))

    @property
    def bound(self) -> str | None:
        """``lower`` or ``upper`` where others are held against it, as recorded."""
        return self.run.facts.get("bound", OLDER.get(self.strategy))

    @property
    def stream(self) -> str:
        """As recorded."""
        return str(self.run.facts.get("stream", "stream"))

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Summaries of the matrix, in [0, 1]; NaN where one is not defined."""
        told = self.summary.get("task_aware_acc")
        return {
            **summarise(self.run.matrix),
            "task_aware_acc": math.nan if told is None else float(told),
        }

    def layers(self) -> list[dict[str, str]]:
        """Lines of ``layers.csv``."""
        path = self.run.directory / LAYERS
        return list(csv.DictReader(io.StringIO(read_text(path)))) if path.exists() else []


@dataclass
class Row:
    """Runs that differ in their seed alone.

    Attributes:
        label: strategy, and what tells it from other rows of that strategy.
        trials: by seed, one each.
        upper: the upper bound of its block, if there is one.
    """

    label: str
    trials: list[Trial]
    upper: "Row | None" = field(default=None, repr=False)

    @property
    def strategy(self) -> str:
        """What all its runs have."""
        return self.trials[0].strategy

    @property
    def bound(self) -> str | None:
        """``lower`` or ``upper`` where others lie above or below it."""
        return self.trials[0].bound

    @property
    def n(self) -> int:
        """How many seeds."""
        return len(self.trials)

    @property
    def seeds(self) -> list[int]:
        """Of its runs."""
        return [trial.seed for trial in self.trials]

    @property
    def matrices(self) -> Matrix:
        """R of every seed, (n, T + 1, T)."""
        return np.stack([trial.run.matrix for trial in self.trials])

    @property
    def selection(self) -> Mapping[str, Any] | None:
        """How its hyperparameters were chosen, if they were."""
        return self.trials[0].selection

    @property
    def reference(self) -> Mapping[str, Any] | None:
        """Published numbers for this strategy in this setting."""
        found = self.trials[0].reference
        return found if found and found.get("strategy", self.strategy) == self.strategy else None

    @cached_property
    def values(self) -> dict[str, Matrix]:
        """Every metric, a value per seed, in [0, 1]; NaN where it is not defined."""
        found = {
            key: np.array([trial.metrics[key] for trial in self.trials])
            for key in METRICS
            if key != "intransigence"
        }
        found["intransigence"] = np.array([self._intransigence(t) for t in self.trials])
        return found

    def _intransigence(self, trial: Trial) -> float:
        if self.upper is None or self.upper is self:
            return math.nan
        same = [t for t in self.upper.trials if t.seed == trial.seed]
        if not same:
            return math.nan
        return intransigence(trial.run.matrix, same[0].run.matrix)

    def mean(self, metric: str) -> float:
        """Over seeds."""
        return float(self.values[metric].mean())

    def std(self, metric: str) -> float:
        """Over seeds, of the sample (n - 1); NaN for one seed."""
        return float(self.values[metric].std(ddof=1)) if self.n > 1 else math.nan

    def cost(self, name: str) -> float:
        """Mean over seeds of an entry of ``summary.json``; NaN if a run lacks it."""
        found = [trial.summary.get(name) for trial in self.trials]
        return math.nan if None in found else float(np.mean(np.array(found, dtype=float)))


@dataclass(frozen=True)
class Comparison:
    """A paired test of one row against the best of its block.

    Attributes:
        p: two-sided, adjusted by Holm's procedure over the block's comparisons.
        n: common seeds.
        difference: mean of the row minus the best, in [0, 1].
    """

    p: float
    n: int
    difference: float


@dataclass
class Block:
    """Rows that can be compared.

    Attributes:
        title: stream, and what tells it from other blocks of it.
        stream: its name.
        task_id_known: at test time, for all of them.
        rows: bounds first and last, the others by ACC.
    """

    title: str
    stream: str
    task_id_known: bool
    rows: list[Row]

    @property
    def task_names(self) -> list[str]:
        """Columns of the matrices."""
        return self.rows[0].trials[0].run.task_names

    def best(self, metric: str) -> Row | None:
        """The row with the best mean, bounds aside; None where there is nothing to compare."""
        found = [r for r in self.rows if not r.bound and not math.isnan(r.mean(metric))]
        sign = METRICS[metric][1]
        return max(found, key=lambda row: sign * row.mean(metric)) if len(found) > 1 else None

    def shown(self) -> list[str]:
        """Metrics that some row has."""
        return [k for k in METRICS if any(not math.isnan(r.mean(k)) for r in self.rows)]

    @cached_property
    def comparisons(self) -> dict[str, Comparison]:
        """By label: paired t-tests of ACC against the best row, where three seeds are common."""
        best = self.best("acc")
        if best is None:
            return {}
        raw: dict[str, Comparison] = {}
        for row in self.rows:
            if row is best or row.bound:
                continue
            common = sorted(set(row.seeds) & set(best.seeds))
            if len(common) < 3:
                continue
            mine, theirs = (
                np.array([r.values["acc"][r.seeds.index(seed)] for seed in common])
                for r in (row, best)
            )
            difference = mine - theirs
            # Equal in every seed, or apart by the same number: there is no spread to test with.
            if np.ptp(difference) == 0:
                p = 1.0 if difference[0] == 0 else math.nan
            else:
                p = float(stats.ttest_rel(mine, theirs).pvalue)
            raw[row.label] = Comparison(p, len(common), float(difference.mean()))
        return _holm(raw)

    def warnings(self) -> list[str]:
        """Costs in which rows differ by more than :data:`TOLERANCE`."""
        found = []
        for name, title in COSTS.items():
            costs = [(row.cost(name), row.label) for row in self.rows]
            known = [c for c in costs if not math.isnan(c[0])]
            if len(known) < 2:
                continue
            (least, low), (most, high) = min(known), max(known)
            if most > (1 + TOLERANCE) * least:
                apart = f"{most / least:.2f} times" if least > 0 else "from nothing"
                found.append(
                    f"{title}: {apart}, {format_cost(name, least)} ({low}) to "
                    f"{format_cost(name, most)} ({high})"
                )
        return found


@dataclass
class Study:
    """Everything that a report shows.

    Attributes:
        blocks: of rows that can be compared.
        left_out: runs that are not in it, and why.
        searches: trials of searches, never compared with anything else.
    """

    blocks: list[Block]
    left_out: list[str]
    searches: list[Trial]

    def rows(self) -> Iterator[Row]:
        """Of all blocks."""
        for block in self.blocks:
            yield from block.rows


def read_study(paths: Iterable[Path | str]) -> Study:
    """All runs in and under some directories.

    Raises:
        UsageError: there is no run that was completed.
    """
    given = [Path(p) for p in paths]
    trials: list[Trial] = []
    left_out: list[str] = []
    for directory in find_runs(given):
        try:
            trial = _read_trial(directory, left_out)
        except UsageError as error:
            left_out.append(printable(f"{directory}: {error}"))
            continue
        done, T = tasks_learned(trial.run.matrix), len(trial.run.task_names)
        if trial.run.status != "completed":
            status = printable(f"{directory}: {trial.run.status}")
            left_out.append(f"{status}, {done} of {T} tasks learned")
        else:
            trials.append(trial)
    searches = [t for t in trials if t.run.facts.get("search")]
    trials = [t for t in trials if not t.run.facts.get("search")]
    if not trials and not searches:
        where = ", ".join(map(str, given))
        more = f"; {left_out[0]}" if left_out else ""
        raise UsageError(
            f"{where}: no completed run is in there{more}; name directories of runs or sweeps, "
            "such as runs/permuted_digits"
        )
    return Study(_blocks(trials, left_out), left_out, searches)


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Directories of runs in and under ``paths``, each once.

    Raises:
        UsageError: a path does not exist.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise UsageError(f"{path}: there is no such directory; name a run, or what holds runs")
        for left in sorted([*path.rglob(RESULTS), *path.rglob(MATRIX)]):
            if SUPERSEDED not in left.parts:
                found.setdefault(left.parent.resolve(), left.parent)
    return list(found.values())


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dictionaries by dotted names; lists are leaves."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def format_cost(name: str, value: float) -> str:
    """With its unit."""
    if math.isnan(value):
        return "-"
    if name.endswith("seconds"):
        return f"{value:.1f} s" if value < 60 else f"{int(value // 60)}:{int(value % 60):02} min"
    if name.endswith("bytes"):
        for unit in ("B", "kB", "MB", "GB"):
            if value < 1000 or unit == "GB":
                return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
            value /= 1000
    if name == "inference_overhead":
        return f"{value:.2f}x"
    return f"{value:,.0f}"


def differences(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Settings in which rows differ, a value per row; those of the strategies themselves last."""
    keys = dict.fromkeys(k for row in rows for k in row.trials[0].settings)
    missing = object()
    found = {}
    for key in keys:
        hydras = key.rpartition(".")[2].startswith("_")
        if key.partition(".")[0] in INCIDENTAL or key in PACKING or hydras:
            continue
        values = [row.trials[0].settings.get(key, missing) for row in rows]
        if len({repr(v) for v in values}) > 1:
            found[key] = ["" if v is missing else v for v in values]
    return dict(sorted(found.items(), key=lambda item: item[0].startswith("strategy.")))


def _read_trial(directory: Path, left_out: list[str]) -> Trial:
    run = read_run(directory)
    verify_weights(directory, read_journal(directory))
    config: Any = shown(read_config(directory))
    run = replace(run, task_names=shown(run.task_names), facts=shown(run.facts))
    reference, selection = config.get("reference"), run.facts.get("selection")
    summary = read_json(directory / SUMMARY) or {}
    require_numbers(summary, (*COSTS, "task_aware_acc"), directory / SUMMARY)
    return Trial(
        run=run,
        summary=shown(summary),
        settings=dict(flat(config)) if config else {},
        reference=reference if isinstance(reference, Mapping) else None,
        selection=selection if isinstance(selection, Mapping) else None,
        command=_command(directory, left_out),
    )


def _command(directory: Path, left_out: list[str]) -> str:
    """The command line of a run; a note where there is one that cannot be read."""
    path = directory / COMMAND
    try:
        return printable(read_text(path).strip()) if path.exists() else ""
    except UsageError as error:
        left_out.append(printable(f"the command of {directory}: {error}"))
        return ""


def _blocks(trials: Sequence[Trial], left_out: list[str]) -> list[Block]:
    grouped: dict[tuple, list[Trial]] = {}
    for trial in trials:
        own = [
            (k, repr(v))
            for k, v in sorted(trial.settings.items())
            if k.startswith("stream.") and k not in (*PACKING, "stream.task_id_at_test")
        ]
        key = (trial.stream, tuple(trial.run.task_names), tuple(own), trial.run.task_id_known)
        grouped.setdefault(key, []).append(trial)
    blocks = []
    for key, members in sorted(grouped.items(), key=lambda item: (item[0][0], item[0][3])):
        stream, _, settings, known = key
        others = [k for k in grouped if k[0] == stream and k[2] != settings]
        apart = sorted({k for other in others for k, _ in set(settings) ^ set(other[2])})
        said = [f"{k.partition('.')[2]}={v}" for k, v in settings if k in apart]
        blocks.append(Block(" ".join([stream, *said]), stream, known, _rows(members, left_out)))
    return blocks


def _rows(trials: Sequence[Trial], left_out: list[str]) -> list[Row]:
    grouped: dict[tuple, list[Trial]] = {}
    for trial in trials:
        own = tuple(
            (k, repr(v))
            for k, v in sorted(trial.settings.items())
            if k.partition(".")[0] not in INCIDENTAL and k not in PACKING
        )
        grouped.setdefault((trial.strategy, own), []).append(trial)
    rows = []
    for (strategy, mine), members in grouped.items():
        others = [k[1] for k in grouped if k[0] == strategy and k[1] != mine]
        apart = {k for other in others for k, _ in set(mine) ^ set(other)}
        said = [f"{k.removeprefix('strategy.')}={v}" for k, v in mine if k in apart]
        rows.append(Row(" ".join([strategy, *said]), _one_a_seed(members, left_out)))
    upper = next((row for row in rows if row.bound == "upper"), None)
    for row in rows:
        row.upper = upper
    order = {"lower": 0, None: 1, "upper": 2}
    return sorted(rows, key=lambda row: (order[row.bound], -row.mean("acc"), row.label))


def _one_a_seed(trials: Sequence[Trial], left_out: list[str]) -> list[Trial]:
    """The latest of several runs with the same settings and seed."""
    latest: dict[int, Trial] = {}
    for trial in sorted(trials, key=_started):
        if trial.seed in latest:
            before = printable(latest[trial.seed].run.directory)
            left_out.append(f"{before}: run again later, same settings")
        latest[trial.seed] = trial
    return [latest[seed] for seed in sorted(latest)]


def _started(trial: Trial) -> str:
    return str(read_results(trial.run.directory)[0].get("time"))


def _holm(raw: Mapping[str, Comparison]) -> dict[str, Comparison]:
    """Holm (1979): the k-th smallest of m p-values times m - k + 1, never falling."""
    ordered = sorted((c.p, label) for label, c in raw.items() if not math.isnan(c.p))
    adjusted, highest = {}, 0.0
    for k, (p, label) in enumerate(ordered):
        highest = max(highest, min(1.0, p * (len(ordered) - k)))
        adjusted[label] = highest
    return {
        label: Comparison(adjusted.get(label, math.nan), c.n, c.difference)
        for label, c in raw.items()
    }
