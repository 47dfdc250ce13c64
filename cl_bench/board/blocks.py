"""The board as it stands: for every protocol, blocks of cells that may be compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cl_bench.board.cells import SPURIOUS, Cell, read_cells
from cl_bench.board.measured import measured_cells
from cl_bench.board.protocol import Method, Protocol
from cl_bench.board.verdict import Finding, find
from cl_bench.places import conf_directory
from cl_bench.report.figures import pareto

PARETO = {"wall_seconds": "time", "strategy_bytes": "memory"}
"""Costs over which nothing else is better, and what they are called."""


@dataclass(frozen=True)
class Entry:
    """One place on the board.

    Attributes:
        protocol: whose it is.
        method: whose it is.
        cell: what was measured; None where it was not run.
        finding: the verdict on it.
    """

    protocol: Protocol
    method: Method
    cell: Cell | None
    finding: Finding | None

    @property
    def block(self) -> str:
        """What it was given that others were not: rows of two blocks are never ranked together."""
        keeps = self.cell is not None and self.cell.cost("exemplars") > 0 and not self.bound
        return self.among(keeps, self.method.old_validation)

    def among(self, keeps: bool, old_validation: bool) -> str:
        """The block of what keeps old samples or reads old validation data, else as this."""
        known = self.cell is not None and self.cell.task_id_known
        given = ["task id known at test time"] if known else []
        given += ["old samples kept"] if keeps else []
        given += [f"pre-trained: {self.protocol.pretraining}"] if self.protocol.pretraining else []
        given += ["validation data of old tasks"] if old_validation else []
        return ", ".join(given) or "nothing but the stream"

    @property
    def bound(self) -> str | None:
        """``lower`` or ``upper``."""
        if self.method.name in self.protocol.naives:
            return "lower"
        return "upper" if self.method.strategy == "joint" else None


def board(protocols: Mapping[str, Protocol], root: Path | None) -> list[Entry]:
    """Every place, in the order of protocols and their methods.

    Args:
        protocols: by name.
        root: folder of the cells; None where there is none.

    Raises:
        UsageError: a cell is damaged.
    """
    kept = {(c.protocol, c.method): c for c in read_cells(root)} if root else {}
    measured = root.parent if root and root == results_directory() else None  # ours, with ours
    entries = []
    for protocol in protocols.values():
        older = measured_cells(protocol, measured) if measured else []
        found = {**{c.method: c for c in older}}
        found |= {m: c for (p, m), c in kept.items() if p == protocol.name}
        for method in protocol.methods.values():
            cell = found.get(method.name)
            finding = find(cell, found.get(method.naive)) if cell else None
            entries.append(Entry(protocol, method, cell, finding))
    return entries


def blocks(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Cells of one protocol by block, the best first; bounds are in every block of their kind."""
    grouped: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.cell is not None:
            grouped.setdefault(entry.block, []).append(entry)

    for entry in (e for e in entries if e.cell is not None and e.bound):
        for title in {entry.among(k, v) for k in (True, False) for v in (True, False)}:
            if title in grouped and entry not in grouped[title]:
                grouped[title].append(entry)

    def acc(entry: Entry) -> float:
        return float(entry.cell.values("acc").mean()) if entry.cell else 0.0

    return {name: sorted(rows, key=acc, reverse=True) for name, rows in sorted(grouped.items())}


def fronts(rows: Sequence[Entry], cost: str) -> set[str]:
    """Methods of a block that no other beats in ACC and a cost."""
    known = [e for e in rows if e.cell is not None and e.cell.cost(cost) == e.cell.cost(cost)]
    points = [(e.cell.cost(cost), float(e.cell.values("acc").mean())) for e in known if e.cell]
    return {known[k].method.name for k in pareto(points)}


def taken_apart(rows: Sequence[Entry]) -> bool:
    """Whether a probe told what was lost from what only seems to be, of any of them."""
    return any(SPURIOUS in run.scores for e in rows if e.cell for run in e.cell.runs)


def counts(entries: Sequence[Entry]) -> dict[str, int]:
    """Places, cells that were run, with a verdict, and against bands that discriminate.

    A lower bound has no verdict: there is nothing that it must be told from.
    """
    run = [e for e in entries if e.cell is not None]
    judged = [e for e in run if e.finding and e.finding.judged]
    bands = [e for e in judged if e.finding and e.finding.discriminates]
    return {"places": len(entries), "run": len(run), "verdicts": len(judged), "bands": len(bands)}


def results_directory() -> Path | None:
    """Where a checkout keeps cells; None in an installed package."""
    docs = conf_directory().parent / "docs/results"
    return docs / "board" if docs.is_dir() else None
