"""Single runs from their directories, as reports read them."""

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cl_bench.contracts import UsageError
from cl_bench.errors import printable
from cl_bench.metrics.mixed import summarise_alike
from cl_bench.report.escape import shown
from cl_bench.report.quantities import COSTS, MORE
from cl_bench.tracking import Run, read_run
from cl_bench.tracking.aside import SUPERSEDED
from cl_bench.tracking.files import (
    COMMAND,
    DATA,
    LAYERS,
    MATRIX,
    RESULTS,
    SUMMARY,
    read_json,
    read_text,
)
from cl_bench.tracking.reading import read_config
from cl_bench.tracking.renamed import without_idle
from cl_bench.tracking.verify import require_numbers

OLDER = {"finetune": "lower", "joint": "upper"}
"""Bounds by name, in runs that were recorded before strategies said it themselves."""


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
        features: whose features the inputs are, and what of the stream that network may have seen
            before; empty where inputs are the stream's own.
    """

    run: Run
    summary: Mapping[str, Any]
    settings: Mapping[str, Any]
    reference: Mapping[str, Any] | None
    selection: Mapping[str, Any] | None
    command: str
    features: str

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
    def keeps_samples(self) -> bool:
        """Whether samples of old tasks were kept at its end; not known of older runs."""
        return bool(self.summary.get("exemplars"))

    @property
    def stream(self) -> str:
        """As recorded."""
        return str(self.run.facts.get("stream", "stream"))

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Summaries of the matrix, in [0, 1]; NaN where one is not defined."""
        told = self.summary.get("task_aware_acc")
        return {
            **summarise_alike(self.run.matrix, self.run.metrics),
            "task_aware_acc": math.nan if told is None else float(told),
            **{key: self.run.incremental.get(key, math.nan) for key in MORE},
        }

    def layers(self) -> list[dict[str, str]]:
        """Lines of ``layers.csv``."""
        path = self.run.directory / LAYERS
        return list(csv.DictReader(io.StringIO(read_text(path)))) if path.exists() else []


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


def read_trial(directory: Path, left_out: list[str]) -> Trial:
    """A run from its files.

    Args:
        directory: of the run.
        left_out: takes a note where the command line cannot be read.

    Raises:
        UsageError: another file is damaged.
    """
    run = read_run(directory, weights=True)
    config: Any = shown(read_config(directory))
    run = replace(run, task_names=shown(run.task_names), facts=shown(run.facts))
    reference, selection = config.get("reference"), run.facts.get("selection")
    summary = read_json(directory / SUMMARY) or {}
    require_numbers(summary, (*COSTS, "task_aware_acc"), directory / SUMMARY)
    return Trial(
        run=run,
        summary=shown(summary),
        settings=dict(flat(without_idle(config))) if config else {},
        reference=reference if isinstance(reference, Mapping) else None,
        selection=selection if isinstance(selection, Mapping) else None,
        command=_command(directory, left_out),
        features=_features(read_json(directory / DATA) or {}),
    )


def _features(data: Mapping[str, Any]) -> str:
    """A few words on the frozen network that made the inputs, with its classes and the stream's."""
    backbone = (data.get("facts") or {}).get("backbone")
    if not backbone:
        return ""
    network = str(backbone.get("layer")).partition(":")[0].rpartition(".")[2]
    trained, shared = backbone.get("trained_on"), backbone.get("overlap")
    known = (
        f"{shared['classes']} of {shared['of']} classes in {trained}"
        if isinstance(shared, Mapping)
        else f"trained on {trained}"
    )
    return str(shown(f"on features of {network} ({known})"))


def _command(directory: Path, left_out: list[str]) -> str:
    """The command line of a run; a note where there is one that cannot be read."""
    path = directory / COMMAND
    try:
        return printable(read_text(path).strip()) if path.exists() else ""
    except UsageError as error:
        left_out.append(printable(f"the command of {directory}: {error}"))
        return ""


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dictionaries by dotted names; lists are leaves."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value
