"""The board as Markdown with figures: all protocols, and a section for a method's page."""

from collections.abc import Sequence
from pathlib import Path

from cl_bench.board.blocks import PARETO, Entry, blocks, counts, fronts, taken_apart
from cl_bench.board.cells import SPURIOUS, as_row
from cl_bench.board.command import spread
from cl_bench.report.escape import markdown
from cl_bench.report.figures import KINDS, write_figure
from cl_bench.report.latex import Wishes
from cl_bench.report.quantities import format_cost
from cl_bench.report.rows import Block

WIDTH = 6.5
"""Inches of a figure on the page."""


def board_tables(entries: Sequence[Entry], folder: Path, root: Path | None) -> str:
    """The tables of all protocols; figures are written beside it.

    Args:
        entries: the board.
        folder: of the page.
        root: folder of the cells.
    """
    found = counts(entries)
    parts = [
        f"{found['run']} of {found['places']} cells are run, {found['verdicts']} have a verdict, "
        f"{found['bands']} are held against published bands that finetuning misses.",
    ]
    for name in dict.fromkeys(entry.protocol.name for entry in entries):
        mine = [entry for entry in entries if entry.protocol.name == name]
        protocol = mine[0].protocol
        parts += [f"## {markdown(protocol.title)}", f"{markdown(protocol.what)}."]
        parts.append(f"    python -m cl_bench board run {name}")
        for title, rows in blocks(mine).items():
            parts += [f"**{markdown(title)}**", _table(rows)]
        missing = [entry.method.name for entry in mine if entry.cell is None]
        if missing:
            parts.append(f"*Not run: {', '.join(f'`{m}`' for m in missing)}.*")
        if root:
            parts += _figures(mine, folder, root)
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Entry]) -> str:
    banded = any(_band(entry) for entry in rows)
    published = ["published", "deviation"] if banded else []
    apart = ["spurious"] if taken_apart(rows) else []
    head = ["method", "n", "ACC", "BWT", *apart, *PARETO.values(), *published, "verdict"]
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 2)}---|"]
    best = {cost: fronts(rows, cost) for cost in PARETO}
    for entry in rows:
        cell, finding = entry.cell, entry.finding
        assert cell is not None
        assert finding is not None
        costs = []
        for cost, on in best.items():
            text = format_cost(cost, cell.cost(cost))
            costs.append(f"**{text}**" if entry.method.name in on else text)
        name = entry.method.name
        link = f"[{name}](strategy/{entry.method.strategy}.md){'' if cell.kept else '°'}"
        cells = [link, str(len(cell.runs)), spread(cell.values("acc").tolist())]
        cells.append(spread(cell.values("bwt").tolist(), "+"))
        cells += [*(spread(cell.values(SPURIOUS).tolist()) for _ in apart), *costs]
        cells += [_band(entry), finding.deviation] if banded else []
        cells.append(markdown(finding.text))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _band(entry: Entry) -> str:
    band = entry.finding.band if entry.finding else None
    return "" if band is None else f"{band.published:.2f} ± {band.tolerance:.2f}"


def _figures(entries: Sequence[Entry], folder: Path, root: Path) -> list[str]:
    """Curves and costs of every block whose records are kept."""
    parts = []
    for number, rows in enumerate(blocks(entries).values(), start=1):
        kept = [entry for entry in rows if entry.cell is not None and entry.cell.kept]
        if len(kept) < 2:
            continue
        protocol = kept[0].protocol
        read = [as_row(root, e.cell, e.bound) for e in kept if e.cell is not None]
        block = Block(protocol.title, protocol.name, False, read)
        for kind, said in (("curve", "mean score after every task"), ("cost", "ACC over time")):
            name = f"board-{protocol.name}-{number}-{kind}.svg"
            figure = KINDS[kind](block, Wishes(), WIDTH)
            (folder / "images" / name).write_bytes(write_figure(figure, Path(name)))
            parts.append(f"![{protocol.title}: {said}](images/{name})")
    return parts


def method_section(entries: Sequence[Entry], strategy: str) -> str:
    """Where a strategy stands on the board; nothing where it is on none."""
    mine = [entry for entry in entries if entry.method.strategy == strategy]
    if not mine:
        return "It is on no protocol of the board."
    lines = ["| protocol | n | ACC | published | deviation | verdict | time | memory |"]
    lines.append("|---|---:|---:|---:|---:|---|---:|---:|")
    for entry in mine:
        cell, finding = entry.cell, entry.finding
        own = "" if entry.method.name == strategy else f", `{entry.method.name}`"
        link = f"[{markdown(entry.protocol.title)}](../board.md){own}"
        if cell is None or finding is None:
            lines.append(f"| {link} |  |  |  |  | not run |  |  |")
            continue
        costs = [format_cost(cost, cell.cost(cost)) for cost in PARETO]
        numbers = [str(len(cell.runs)), spread(cell.values("acc").tolist()), _band(entry)]
        told = [finding.deviation, markdown(finding.text), *costs]
        lines.append(f"| {link} | {' | '.join([*numbers, *told])} |")
    tried = [_trials(entry) for entry in mine if entry.cell is not None and entry.cell.trials]
    return "\n".join([*lines, "", *tried])


def _trials(entry: Entry) -> str:
    """What was chosen of a cell, and everything that it was chosen among."""
    assert entry.cell is not None
    scored = []
    for trial in entry.cell.trials:
        acc = trial.scores.get("acc")
        said = f"`{', '.join(f'{k}={v}' for k, v in trial.settings.items())}` "
        said += "failed" if acc is None else f"{100 * acc:.2f}"
        chosen = trial.settings.items() <= entry.cell.settings.items()
        scored.append(f"**{said}**" if chosen else said)
    where = f"{markdown(entry.protocol.title)}, `{entry.method.name}`"
    return f"* {where}: chosen by ACC on validation data, of {'; '.join(scored)}"
