"""The comparison of two runs: every number of their records, times left out."""

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from cl_bench.tracking import read_matrix, read_results
from cl_bench.tracking.files import SUMMARY, read_json

STORAGE = ("checkpoint_bytes", "weights_bytes")
MEASURED = ("peak_memory_bytes", "peak_device_bytes", "inference_overhead")
"""Quantities that differ between any two runs."""

CACHE = ("from_cache", "final_loss")
"""Of pre-training: whoever comes second finds the weights of the first."""


@dataclass(frozen=True)
class Difference:
    """Where two records differ.

    Attributes:
        what: the part of the record.
        count: how many of its values differ.
        largest: the largest difference of two numbers; None where something else differs.
        where: the value that differs most, with both values.
    """

    what: str
    count: int
    largest: float | None
    where: str

    def __str__(self) -> str:
        size = "" if self.largest is None else f", by up to {self.largest:.3g}"
        return f"{self.what}: {self.count} value(s) differ{size} ({self.where})"


def compare_runs(a: Path, b: Path) -> list[Difference]:
    """Compare matrix, events, summary and weights of two finished runs.

    Times, and what says how much was stored, are not compared; weights are, bit for bit, where both
    runs keep them. Quantities whose names only one of the records knows are left out, for versions
    of the program differ in what they record: see :func:`recorded_by_one`.

    Returns:
        One entry for each part of the record that differs; empty if all is identical.

    Raises:
        UsageError: one of them holds no run.
    """
    alone = set(recorded_by_one(a, b))
    found = [
        *_differing("accuracy matrix", _matrix(a), _matrix(b)),
        *_differing("events", _without(_events(a), alone), _without(_events(b), alone)),
        *_differing("summary", _without(_summary(a), alone), _without(_summary(b), alone)),
    ]
    for path in sorted((a / "weights").glob("*.safetensors")):
        other = b / "weights" / path.name
        if other.exists():
            one, two = load_file(path), load_file(other)
            equal = one.keys() == two.keys() and all(
                one[k].tobytes() == two[k].tobytes() and one[k].shape == two[k].shape for k in one
            )
            if not equal:
                found += _differing(
                    f"weights after {int(path.stem.removeprefix('task'))} tasks",
                    {k: v.tolist() for k, v in one.items()},
                    {k: v.tolist() for k, v in two.items()},
                )
    return found


def _matrix(directory: Path) -> dict[str, Any]:
    names, matrix = read_matrix(directory)
    return {
        f"R[{i}, {name}]": None if np.isnan(matrix[i, j]) else float(matrix[i, j])
        for i in range(len(matrix))
        for j, name in enumerate(names)
    }


def _events(directory: Path) -> dict[str, Any]:
    # Weights are compared themselves, where both runs keep them.
    events = [e for e in read_results(directory) if e["event"] != "weights"]
    return {f"{e['event']}, event {i}": _timeless(e) for i, e in enumerate(events, start=1)}


def _summary(directory: Path) -> Any:
    return _timeless(read_json(directory / SUMMARY))


def recorded_by_one(a: Path, b: Path) -> list[str]:
    """Names of quantities that stand in the events or summary of only one of two runs."""
    one, two = ({*_names(_summary(d)), *_names(list(_events(d).values()))} for d in (a, b))
    return sorted(one ^ two)


def _names(value: Any) -> Iterator[str]:
    """Keys at any depth."""
    if isinstance(value, Mapping):
        yield from value
    for inner in value.values() if isinstance(value, Mapping) else value:
        if isinstance(inner, Mapping | list):
            yield from _names(inner)


def _without(value: Any, names: Set[str]) -> Any:
    if isinstance(value, Mapping):
        return {k: _without(v, names) for k, v in value.items() if k not in names}
    return [_without(v, names) for v in value] if isinstance(value, list) else value


def _timeless(value: Any) -> Any:
    """Without times and storage, at any depth."""
    if not isinstance(value, Mapping):
        return value
    left_out = (
        "time",
        "files",
        *STORAGE,
        *MEASURED,
        *(CACHE if value.get("status") == "pretrained" else ()),
    )
    return {
        k: _timeless(v)
        for k, v in value.items()
        if k not in left_out and not str(k).endswith("seconds")
    }


def _differing(what: str, a: Any, b: Any) -> list[Difference]:
    pairs = list(_pairs(a, b, ""))
    if not pairs:
        return []
    sizes = [_size(x, y) for _, x, y in pairs]
    numbers = [s for s in sizes if s is not None]
    # What is not a number in both differs more than any number.
    worst = max(range(len(pairs)), key=lambda i: float("inf") if sizes[i] is None else sizes[i])  # type: ignore[arg-type,return-value]
    name, x, y = pairs[worst]
    where = f"{name}: {_short(x)} / {_short(y)}"
    return [Difference(what, len(pairs), max(numbers) if numbers else None, where)]


def _pairs(a: Any, b: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    """All values that differ."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in dict.fromkeys((*a, *b)):
            inner = f"{where}.{key}" if where else str(key)
            yield from _pairs(a.get(key, "nothing"), b.get(key, "nothing"), inner)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _pairs(x, y, f"{where}[{i}]")
    elif a != b:
        yield where, a, b


def _size(a: Any, b: Any) -> float | None:
    if isinstance(a, int | float) and isinstance(b, int | float):
        return abs(float(a) - float(b))
    return None


def _short(value: Any) -> str:
    return str(value)[:60]
