"""Checks that a run's files are what the run wrote."""

import csv
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cl_bench.contracts import UsageError
from cl_bench.metrics import Matrix, empty_matrix
from cl_bench.tracking.files import (
    CONFIG,
    DATA,
    MATRIX,
    PUT_BACK,
    SUMMARY,
    digest,
    read_bytes,
    read_json,
    read_text,
)
from cl_bench.tracking.journal import Line, check_events, is_number, read_journal
from cl_bench.tracking.tables import Tables

WEIGHED_BYTES = 256 * 2**20
"""Up to this size, weights are hashed wherever a run is read; ``export=`` hashes what it takes."""


def verified(directory: Path, task_names: Sequence[str] | None = None) -> list[Line]:
    """The events of a run whose files are what the run wrote.

    Args:
        directory: of the run.
        task_names: of its stream; None takes those that it recorded.

    Raises:
        UsageError: a file or a line of ``results.jsonl`` was changed, doubled, cut or taken away;
            says which, and what to do.
    """
    if not (directory / CONFIG).is_file():
        raise UsageError(
            f"{directory} holds no run ({CONFIG} is missing): give the directory of a run"
        )
    lines = read_journal(directory)
    if task_names is None:
        task_names = (read_json(directory / DATA) or {}).get("task_names")
        listed = isinstance(task_names, list) and all(isinstance(n, str) for n in task_names)
        if task_names is not None and not listed:
            raise UsageError(f"{directory / DATA} is damaged: task_names is no list; {PUT_BACK}")
    check_events(directory, lines, None if task_names is None else list(task_names))
    for name, expected in _digests(lines).items():
        if not (directory / name).is_file():
            raise UsageError(f"{directory / name} is missing; {PUT_BACK}")
        if digest(read_bytes(directory / name)) != expected:
            raise UsageError(f"{directory / name} is not as the run wrote it; {PUT_BACK}")
    return lines


def verify_tables(directory: Path, lines: Sequence[Line], tables: Tables) -> None:
    """Make sure that ``accuracy_matrix.csv`` says what the events say, and the summary is one.

    A run that was killed has no digests of them, and may lack the row it was writing.

    Raises:
        UsageError: a file is damaged; says which.
    """
    if (directory / MATRIX).exists():
        names, matrix = read_matrix(directory)
        known = np.isfinite(matrix)
        if names != tables.task_names or not np.array_equal(matrix[known], tables.matrix[known]):
            raise UsageError(
                f"{directory / MATRIX} does not say what the events of the run say; {PUT_BACK}"
            )
    if (summary := read_json(directory / SUMMARY)) is not None:
        require_numbers(summary, ("acc",), directory / SUMMARY)


def require_numbers(values: Mapping[str, Any], names: Iterable[str], path: Path) -> None:
    """Raise :class:`UsageError` if one of a file's values, where it is there, is no number."""
    for name in names:
        if not is_number(values.get(name)):
            said = repr(values[name])[:100]
            raise UsageError(f"{path}: {name} is {said}, no number; {PUT_BACK}")


def verify_weights(directory: Path, lines: Sequence[Line], up_to: int = WEIGHED_BYTES) -> None:
    """Make sure that the weights that are kept are those that the run wrote.

    Weights that somebody deleted to save space are no damage.

    Args:
        directory: of the run.
        lines: its events.
        up_to: bytes of all weights together up to which they are hashed; above, sizes are compared.

    Raises:
        UsageError: a file has changed; says which.
    """
    told = {line.event["file"]: line.event for line in lines if line.event["event"] == "weights"}
    there = {directory / name: event for name, event in told.items() if (directory / name).exists()}
    hashes = sum(event["bytes"] for event in there.values()) <= up_to
    for path, event in there.items():
        same = path.stat().st_size == event["bytes"]
        if same and hashes:
            with path.open("rb") as file:
                same = hashlib.file_digest(file, "sha256").hexdigest() == event["sha256"]
        if not same:
            raise UsageError(f"{path} is not as the run wrote it; {PUT_BACK}, or delete it")


def _digests(lines: Sequence[Line]) -> dict[str, str]:
    """What was written before the last event that tells of files, by name."""
    found: dict[str, str] = {}
    for line in lines:
        if line.event["event"] == "status":
            found.update(line.event.get("files") or {})
    return found


def read_matrix(directory: Path | str) -> tuple[list[str], Matrix]:
    """Task names and R, (T + 1, T), of a run; rows that were not reached are NaN.

    Raises:
        UsageError: the run has no matrix yet, or the file is damaged.
    """
    path = Path(directory) / MATRIX
    header, *rows = csv.reader(io.StringIO(read_text(path), newline="")) or [[]]
    names = header[1:]
    matrix = empty_matrix(len(names))
    try:
        for learned, *cells in rows:
            for j, cell in zip(range(len(names)), cells, strict=True):
                matrix[int(learned), j] = float(cell) if cell else np.nan
    except (ValueError, IndexError) as error:
        raise UsageError(
            f"{path} is not an accuracy matrix of {len(names)} tasks ({error})"
        ) from None
    return names, matrix
