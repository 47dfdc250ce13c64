"""Cells out of figures that were measured before records were kept: rows of ``docs/results``."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cl_bench.board.cells import Cell, Record
from cl_bench.board.protocol import Protocol

SCORES = ("acc", "bwt", "forgetting")


def measured_cells(protocol: Protocol, results: Path) -> list[Cell]:
    """Rows that carry what a cell needs, as the protocol names them.

    A row has scores for each of its seeds (or one seed), a command, a commit, a machine and a date.

    Args:
        protocol: whose ``measured`` says ``file``, ``where`` (what rows have), ``known`` and
            ``method`` (the key that names the method) and ``names`` (of methods that a row calls
            otherwise).
        results: folder of the files.
    """
    found: dict[str, Cell] = {}
    for source in protocol.measured:
        for cell in _cells(protocol, source, results):
            found.setdefault(cell.method, cell)
    return list(found.values())


def _cells(protocol: Protocol, source: Mapping[str, Any], results: Path) -> Iterator[Cell]:
    whole = json.loads((results / f"{source['file']}.json").read_text())
    for value in whole["values"]:
        row = {**{k: v for k, v in whole.items() if k != "values"}, **value}
        name = str(row.get(source.get("method", "strategy"), ""))
        name = source.get("names", {}).get(name, name)
        wanted = source.get("where", {})
        if name not in protocol.methods or any(row.get(k) != v for k, v in wanted.items()):
            continue
        runs = list(_runs(row))
        if not runs or not all(row.get(key) for key in ("command", "commit", "machine", "date")):
            continue
        known = row.get("block") == "known" or row.get("task_id") == "known"
        yield Cell(
            protocol=protocol.name,
            method=name,
            command=row["command"],
            date=row["date"],
            machine=row["machine"],
            task_id_known=known or bool(source.get("known", False)),
            settings={},
            runs=runs,
            reference=_published(row, results),
            source=str(source["file"]),
        )


def _runs(row: Mapping[str, Any]) -> Iterator[Record]:
    seeds = row.get("seeds")
    told = row.get("per_seed") or {k: [row[k]] for k in SCORES if isinstance(row.get(k), float)}
    if not isinstance(seeds, list) or len(told.get("acc", ())) != len(seeds):
        return
    costs = {
        "wall_seconds": row.get("seconds"),
        "strategy_bytes": row.get("strategy_bytes"),
        "exemplars": row.get("exemplars"),
    }
    for k, seed in enumerate(seeds):
        scores = {key: values[k] / 100 for key, values in told.items()}
        yield Record(seed, None, scores, costs, row["command"] or "", row["commit"] or "")


def _published(row: Mapping[str, Any], results: Path) -> dict[str, Any] | None:
    name, _, which = str(row.get("published", "")).rpartition("/")
    if not name:
        return None
    whole = json.loads((results / f"{name}.json").read_text())
    for one in whole["values"]:
        if one.get("id") == which:
            source = one.get("source") or whole.get("source") or {}
            said = ", ".join(str(v) for v in source.values())
            return {**{k: v for k, v in one.items() if k != "source"}, "source": said}
    return None
