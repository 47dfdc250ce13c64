"""Tables of a study: on the terminal, as CSV, Markdown and LaTeX. Scores in percent."""

import csv
import io
import math
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cl_bench.report.escape import csv_cell, markdown
from cl_bench.report.latex import KNOWN, PREAMBLE, latex_table
from cl_bench.report.orders import about, order_cells, over_orders
from cl_bench.report.quantities import COSTS, METRICS, format_cost
from cl_bench.report.rows import Block, Row
from cl_bench.report.study import Study

TEST = (
    "p: paired t-test of ACC against the best row, two-sided, n common seeds, Holm-adjusted over "
    "the block"
)
FLAG = "†"


def print_study(study: Study, console: Console) -> None:
    """Results and costs of every block, warnings, and what was left out."""
    for block in study.blocks:
        console.print(Text.assemble((block.title, "bold"), f"  {KNOWN[block.task_id_known]}"))
        for table in results_tables(block, console.width):
            console.print(table)
        for remark in remarks(block):
            console.print(Text(remark, style="dim"), soft_wrap=True)
        console.print()
        console.print(Text("cost, mean over seeds", style="bold"))
        for table in budget_tables(block, console.width):
            console.print(table)
        for warning in block.warnings():
            console.print(Text(f"! {warning}", style="yellow"), soft_wrap=True)
        console.print()
    for orders in over_orders(study):
        known = KNOWN[orders.task_id_known]
        console.print(Text.assemble((f"{orders.title}, over orders", "bold"), f"  {known}"))
        header, lines = order_cells(orders)
        table = Table(*header[:1], box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for title in header[1:]:
            table.add_column(title, justify="right")
        for row, line in zip(orders.rows, lines, strict=True):
            table.add_row(*map(Text, line), style="dim" if row.bound else "")
        console.print(table)
        console.print(Text(about(orders), style="dim"), soft_wrap=True)
        console.print()
    for line in study.left_out:
        console.print(Text(f"left out: {line}", style="yellow"), soft_wrap=True)
    if study.searches:
        count = len(study.searches)
        console.print(Text(f"{count} trials of searches are left out: they saw no test data"))


def results_tables(block: Block, width: int) -> list[Table]:
    """Mean ± standard deviation over seeds, the best of each column in bold.

    Args:
        block: its rows.
        width: columns of the console; what does not fit beside goes below, nothing is cut off.
    """
    columns = {}
    for metric in block.shown():
        columns[METRICS[metric][0]] = [_cell(block, row, metric) for row in block.rows]
        if metric == "acc" and block.comparisons:
            columns["p"] = [Text(p_value(block, row)) for row in block.rows]
    names = [f"{row.label}{f' {FLAG}' if row.selection else ''}" for row in block.rows]
    return _tables(block, names, {"n": [Text(str(r.n)) for r in block.rows], **columns}, width)


def budget_tables(block: Block, width: int) -> list[Table]:
    """What the rows cost, mean over seeds; arguments as of :func:`results_tables`."""
    columns = {
        title: [Text(format_cost(key, row.cost(key))) for row in block.rows]
        for key, title in COSTS.items()
    }
    return _tables(block, [row.label for row in block.rows], columns, width)


def _tables(
    block: Block, names: Sequence[str], columns: Mapping[str, Sequence[Text]], width: int
) -> list[Table]:
    """The fewest tables that hold all columns, none wider than the console; headings may wrap."""
    gap = 2
    begin = max(map(len, [*names, "strategy"])) + gap
    parts: list[list[str]] = [[]]
    used = begin
    for title, cells in columns.items():
        needed = max(*map(len, title.split()), *(len(cell) for cell in cells)) + gap
        if parts[-1] and used + needed > width:
            parts.append([])
            used = begin
        parts[-1].append(title)
        used += needed
    tables = []
    for part in parts:
        table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0))
        table.add_column("strategy", no_wrap=True, width=begin - gap, vertical="bottom")
        whole = {title: max(len(title), *map(len, columns[title])) for title in part}
        fits = begin + sum(whole.values()) + gap * len(part) <= width
        for title in part:
            # Left to itself, rich narrows the cells before it wraps the headings.
            words = max(*map(len, title.split()), *map(len, columns[title]))
            table.add_column(title, justify="right", width=whole[title] if fits else words)
        for k, row in enumerate(block.rows):
            cells = [columns[title][k] for title in part]
            table.add_row(Text(names[k]), *cells, style="dim" if row.bound else "")
        tables.append(table)
    return tables


def _cell(block: Block, row: Row, metric: str) -> Text:
    best = block.best(metric) is row
    return Text(spread(row, metric, 1, metric in ("bwt", "fwt")), "bold green" if best else "")


def remarks(block: Block) -> list[str]:
    """What the reader of a table must know, a line each."""
    found = []
    if any(row.n > 1 for row in block.rows):
        found.append("percent, mean ± standard deviation over n seeds (sample, n - 1)")
    bounds = [f"{row.label} is the {row.bound} bound" for row in block.rows if row.bound]
    if bounds:
        found.append("; ".join(bounds))
    if block.comparisons:
        found.append(TEST)
        few = min(c.n for c in block.comparisons.values())
        if few < 5:
            found.append(f"n = {few} is few: a test of so few pairs rarely sees a difference")
    flagged = [row for row in block.rows if row.selection]
    if flagged:
        first = flagged[0].selection
        assert first is not None
        tasks = ", ".join(first["tasks"])
        trials = sorted({int(row.selection["trials"]) for row in flagged if row.selection})
        found.append(
            f"{FLAG} hyperparameters chosen in {' or '.join(map(str, trials))} trials on "
            f"validation data of {tasks}: these tasks count in ACC, but were seen in choosing"
        )
    return found


def name(row: Row) -> str:
    """Label, bound, and whether hyperparameters were searched."""
    bound = f" ({row.bound} bound)" if row.bound else ""
    return f"{row.label}{bound}{f' {FLAG}' if row.selection else ''}"


def spread(row: Row, metric: str, digits: int, signed: bool = False) -> str:
    """``mean ± std`` in percent; the mean alone for one seed; a dash where it is not defined."""
    mean, std = 100 * row.mean(metric), 100 * row.std(metric)
    if math.isnan(mean):
        return "-"
    text = f"{mean:{'+' if signed else ''}.{digits}f}"
    return text if math.isnan(std) else f"{text} ± {std:.{digits}f}"


def p_value(block: Block, row: Row) -> str:
    """The p value of the row against the best one, as shown."""
    if row is block.best("acc"):
        return "best"
    found = block.comparisons.get(row.label)
    if found is None or math.isnan(found.p):
        return ""
    return "< 0.001" if found.p < 0.001 else f"{found.p:.3f}"


def to_csv(study: Study) -> str:
    """A line per row, with all digits; scores in [0, 1]."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    header = ["stream", "strategy", "task_id_known", "n", "seeds"]
    header += [f"{m}_{kind}" for m in METRICS for kind in ("mean", "std")]
    header += ["acc_p_paired_t_holm", "acc_p_n", *COSTS, "selected_on"]
    writer.writerow(header)
    for block in study.blocks:
        for row in block.rows:
            found = block.comparisons.get(row.label)
            numbers = [v for m in METRICS for v in (row.mean(m), row.std(m))]
            numbers += [found.p if found else math.nan, found.n if found else math.nan]
            numbers += [row.cost(key) for key in COSTS]
            selected = " ".join(row.selection["tasks"]) if row.selection else ""
            named = [csv_cell(block.title), csv_cell(row.label)]
            identity = [*named, block.task_id_known, row.n]
            seeds = " ".join(map(str, row.seeds))
            cells = ["" if math.isnan(v) else repr(float(v)) for v in numbers]
            writer.writerow([*identity, seeds, *cells, csv_cell(selected)])
    return text.getvalue()


def to_markdown(study: Study) -> str:
    """A table per block, the best of each column in bold."""
    parts = []
    for block in study.blocks:
        header, rows = _cells(block)
        lines = [f"### {markdown(block.title)}, {KNOWN[block.task_id_known]}", ""]
        lines += [f"| {' | '.join(header)} |", f"|{'---|' + '---:|' * (len(header) - 1)}"]
        lines += [f"| {' | '.join(cells)} |" for cells in rows]
        parts.append("\n".join([*lines, "", *(f"{markdown(r)}  " for r in remarks(block))]))
    for orders in over_orders(study):
        head, texts = order_cells(orders, 2)
        lines = [f"### {markdown(orders.title)}, over orders, {KNOWN[orders.task_id_known]}", ""]
        lines += [f"| {' | '.join(map(markdown, head))} |"]
        lines += [f"|{'---|' + '---:|' * (len(head) - 1)}"]
        lines += [f"| {' | '.join(map(markdown, texts_of_row))} |" for texts_of_row in texts]
        parts.append("\n".join([*lines, "", f"{markdown(about(orders))}  "]))
    return "\n\n".join(parts) + "\n"


def to_latex(study: Study) -> str:
    """A ``booktabs`` table per block; :mod:`cl_bench.report.paper` makes chosen ones."""
    return PREAMBLE + "\n\n".join(latex_table(block) for block in study.blocks) + "\n"


def _cells(block: Block) -> tuple[list[str], list[Sequence[str]]]:
    """Header and rows with two decimals, as Markdown."""
    metrics = block.shown()
    header = ["strategy", "n", *(METRICS[m][0] for m in metrics)]
    header += ["p"] if block.comparisons else []
    rows: list[Sequence[str]] = []
    for row in block.rows:
        cells = []
        for metric in metrics:
            text = markdown(spread(row, metric, 2))
            cells.append(f"**{text}**" if block.best(metric) is row else text)
        cells += [markdown(p_value(block, row))] if block.comparisons else []
        rows.append([markdown(name(row)), str(row.n), *cells])
    return [markdown(title) for title in header], rows
