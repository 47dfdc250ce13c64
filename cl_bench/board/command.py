"""``python -m cl_bench board``: the board, its cells, and checks of them."""

import argparse
import random
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cl_bench.board.blocks import (
    PARETO,
    Entry,
    blocks,
    board,
    counts,
    fronts,
    results_directory,
    taken_apart,
)
from cl_bench.board.cells import SPURIOUS, read_cells
from cl_bench.board.protocol import Method, Protocol, protocols
from cl_bench.board.running import best_trial, run_cell, take_in
from cl_bench.board.verifying import pick, verify
from cl_bench.contracts import UsageError
from cl_bench.errors import printable
from cl_bench.report.quantities import format_cost
from cl_bench.report.trials import find_runs, read_trial

DIFFERENT, FAILED = 1, 2
"""Exit status of a check that does not hold, and after an error that the user can put right."""


def main(words: Sequence[str]) -> int:
    """Do what the words after ``board`` say.

    Returns:
        The exit status: 0; 1 where a run that was run again is another; 2 after an error.
    """
    given = _parser().parse_intermixed_args(list(words))
    try:
        known = protocols()
        root = given.results or results_directory()
        if root is None:
            raise UsageError("--results FOLDER: name where cells are kept; this is no checkout")
        if given.what == "run":
            _run(known, given, root)
        elif given.what == "verify":
            return _verify(known, given, root)
        elif given.what == "add":
            _add(known, given, root)
        print_board(board(known, root), Console(), given.cells if given.what == "show" else ())
    except UsageError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return FAILED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cl_bench board",
        description="Every method on declared protocols: show, run, verify, or add runs of yours.",
    )
    parser.add_argument("what", nargs="?", default="show", choices=("show", "run", "verify", "add"))
    parser.add_argument("cells", nargs="*", metavar="PROTOCOL[/METHOD]", help="none: all")
    parser.add_argument("--results", type=Path, help="folder of the cells; docs/results/board")
    parser.add_argument("--runs", type=Path, default=Path("runs/board"), help="where runs are made")
    parser.add_argument("--data", help="folder with mnist/, cifar100/, cl_benchmark/")
    parser.add_argument("--minutes", type=float, default=10.0, help="of a cell, at most (10)")
    parser.add_argument("--hours", type=float, default=12.0, help="of all cells, at most (12)")
    parser.add_argument("--from", dest="taken", type=Path, nargs="+", help="add: folders of runs")
    parser.add_argument("--pick", type=int, help="verify: number that the choice follows from")
    return parser


def _chosen(known: Mapping[str, Protocol], names: Sequence[str]) -> list[tuple[Protocol, Method]]:
    found = []
    for name in names or known:
        protocol, _, method = name.partition("/")
        if protocol not in known:
            raise UsageError(f"{name}: there is no such protocol; there are {', '.join(known)}")
        methods = known[protocol].methods
        if method and method not in methods:
            raise UsageError(f"{name}: {protocol} has no such method; it has {', '.join(methods)}")
        chosen = [methods[method]] if method else methods.values()
        found += [(known[protocol], one) for one in chosen]
    return found


def _run(known: Mapping[str, Protocol], given: argparse.Namespace, root: Path) -> None:
    chosen = _chosen(known, given.cells)
    done = {(cell.protocol, cell.method) for cell in read_cells(root)}
    end = time.monotonic() + 3600 * given.hours
    for protocol, method in chosen:
        name = f"{protocol.name}/{method.name}"
        if (protocol.name, method.name) in done:
            continue
        left = end - time.monotonic()
        if left <= 0:
            print(f"{name}: not run, the {given.hours:g} hours are up")
            continue
        if protocol.needs_data and not given.data:
            print(f"{name}: not run, it needs --data FOLDER")
            continue
        seconds = min(60 * given.minutes, left)
        begun = time.monotonic()
        try:
            cell = run_cell(protocol, method, given.runs, root, given.data, seconds)
        except UsageError as error:  # one cell stops no other
            print(printable(f"{name}: not run, {error}"))
            continue
        took = time.monotonic() - begun
        said = f"{took:.0f} s" if cell else f"not run: stopped after {took:.0f} s, to go on"
        print(f"{name}: {said}", flush=True)


def _verify(known: Mapping[str, Protocol], given: argparse.Namespace, root: Path) -> int:
    named = {(p.name, m.name) for p, m in _chosen(known, given.cells)}
    cells = [c for c in read_cells(root) if (c.protocol, c.method) in named]
    cell, run = pick(cells, random.Random(given.pick))
    check = verify(known[cell.protocol], cell, run, root, given.data)
    print(printable(check.text))
    return 0 if check.holds else DIFFERENT


def _add(known: Mapping[str, Protocol], given: argparse.Namespace, root: Path) -> None:
    if len(given.cells) != 1 or "/" not in given.cells[0] or not given.taken:
        raise UsageError("board add PROTOCOL/METHOD --from runs/...: name one cell and its runs")
    ((protocol, method),) = _chosen(known, given.cells)
    path = root / protocol.name / f"{method.name}.json"
    if path.exists():
        raise UsageError(f"{path}: that cell is there already; move it away to replace it")
    trials = [read_trial(directory, []) for directory in find_runs(given.taken)]
    runs = [trial for trial in trials if not trial.run.facts.get("search")]
    searched = [trial for trial in trials if trial.run.facts.get("search")]
    chosen = best_trial(method, searched) if method.choose else {}
    take_in(protocol, method, chosen, runs, searched, root)


def print_board(entries: Sequence[Entry], console: Console, names: Sequence[str] = ()) -> None:
    """A table for each block of each protocol, what was not run, and how much there is.

    Args:
        entries: the board.
        console: where to.
        names: protocols, or cells, to show; none: all.
    """
    wanted = [n.partition("/")[0] for n in names]
    shown = [e for e in entries if not wanted or e.protocol.name in wanted]
    for protocol in dict.fromkeys(e.protocol.name for e in shown):
        mine = [e for e in shown if e.protocol.name == protocol]
        first = mine[0].protocol
        console.print(Text.assemble((first.title, "bold"), f"  {first.what}"), soft_wrap=True)
        for title, rows in blocks(mine).items():
            console.print(Text(title, style="italic"))
            console.print(_table(rows))
        missing = [e.method.name for e in mine if e.cell is None]
        if missing:
            console.print(Text(f"not run: {', '.join(missing)}", style="yellow"))
        console.print()
    found = counts(entries)
    console.print(
        f"{found['run']} of {found['places']} cells, {found['verdicts']} with a verdict, "
        f"{found['bands']} against published bands that finetune misses"
    )


def _table(rows: Sequence[Entry]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    apart = ["spurious"] if taken_apart(rows) else []
    for title in ("method", "n", "ACC", "BWT", *apart, *PARETO.values(), "verdict"):
        right = title not in ("method", "verdict")
        table.add_column(title, justify="right" if right else "left", no_wrap=title != "verdict")
    best = {cost: fronts(rows, cost) for cost in PARETO}
    for entry in rows:
        cell, finding = entry.cell, entry.finding
        assert cell is not None
        assert finding is not None
        costs = [
            Text(format_cost(cost, cell.cost(cost)), "bold" if entry.method.name in on else "")
            for cost, on in best.items()
        ]
        mark = "" if cell.kept else "°"
        table.add_row(
            Text(f"{entry.method.name}{mark}"),
            str(len(cell.runs)),
            spread(cell.values("acc").tolist()),
            spread(cell.values("bwt").tolist(), "+"),
            *[spread(cell.values(SPURIOUS).tolist()) for _ in apart],
            *costs,
            Text(finding.text),
            style="dim" if entry.bound else "",
        )
    return table


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard deviation (n - 1) of the percentages that are known."""
    known = np.array(values)[~np.isnan(values)]
    if not len(known):
        return "-"
    text = f"{float(known.mean()):{sign}.2f}"
    return text if len(known) < 2 else f"{text} ± {float(known.std(ddof=1)):.2f}"
