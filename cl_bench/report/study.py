"""Runs put side by side: which belong together.

Runs that differ in their seed alone make a row. Rows with one stream, and one answer to
whether the task id is known at test time, to whether samples of old tasks are kept and to whose
features inputs are, can be compared: they make a block. Bounds are in both blocks of a stream.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_bench.contracts import UsageError
from cl_bench.errors import printable
from cl_bench.metrics import tasks_learned
from cl_bench.report.rows import Block, Row
from cl_bench.report.trials import Trial, find_runs, read_trial

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
        """The rows of all blocks."""
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
            trial = read_trial(directory, left_out)
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


def of_data(key: str) -> bool:
    """Whether a setting is of what is learned: of the stream, or of what makes its inputs."""
    where, _, what = key.partition(".")
    if where == "backbone":
        return what not in ("batch_size", "device")
    return where == "stream" and what != "task_id_at_test" and key not in PACKING


def _blocks(trials: Sequence[Trial], left_out: list[str]) -> list[Block]:
    grouped: dict[tuple, list[Trial]] = {}
    for trial in trials:
        own = [(k, repr(v)) for k, v in sorted(trial.settings.items()) if of_data(k)]
        names, known = tuple(trial.run.task_names), trial.run.task_id_known
        alike = (trial.stream, names, tuple(own), known, trial.keeps_samples, trial.features)
        grouped.setdefault(alike, []).append(trial)
    for key in [key for key in grouped if key[4]]:
        grouped[key] += [t for t in grouped.get((*key[:4], False, key[5]), ()) if t.bound]
    blocks = []
    for key, members in sorted(grouped.items(), key=lambda item: (item[0][0], *item[0][3:])):
        stream, _, settings, known, keeps, features = key
        others = [k for k in grouped if k[0] == stream and k[2] != settings]
        apart = sorted({k for other in others for k, _ in set(settings) ^ set(other[2])})
        said = [f"{k.partition('.')[2]}={v}" for k, v in settings if k in apart]
        kept = ["with old samples kept"] if keeps else []
        title = " ".join([stream, *said, *([features] if features else []), *kept])
        blocks.append(Block(title, stream, known, _rows(members, left_out)))
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
    """The latest of several runs with equal settings and seed."""
    latest: dict[int, Trial] = {}
    for trial in sorted(trials, key=lambda trial: trial.run.started):
        if trial.seed in latest:
            before = printable(latest[trial.seed].run.directory)
            said = f"{before}: run again later, same settings"
            left_out += [] if said in left_out else [said]  # bounds are looked at twice
        latest[trial.seed] = trial
    return [latest[seed] for seed in sorted(latest)]
