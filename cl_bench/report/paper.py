"""A table or a figure for a paper, from runs.

``python -m cl_bench.report.paper table runs/... --out table.tex --label tab:main``
``python -m cl_bench.report.paper figure runs/... --out figure.pdf --kind cost``
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cl_bench.contracts import UsageError
from cl_bench.errors import printable
from cl_bench.report.figures import KINDS, write_figure
from cl_bench.report.latex import PREAMBLE, Wishes, latex_table
from cl_bench.report.rows import Block
from cl_bench.report.study import read_study
from cl_bench.tracking import write_atomically

COLUMN = 5.5
"""Inches of a text column, as most templates have it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write what the arguments ask for; 2 after an error that the user can put right."""
    given = _parser().parse_args(arguments)
    try:
        wishes = Wishes(
            columns=_words(given.columns),
            rows=_words(given.rows),
            names=dict(_named(pair) for pair in given.names),
            label=given.label,
            caption=given.caption,
            digits=given.digits,
        )
        block = _block(read_study(given.paths).blocks, given.block)
        if given.what == "table":
            content = (PREAMBLE + latex_table(block, wishes) + "\n").encode()
        else:
            if given.width < 2:
                raise UsageError(f"--width {given.width}: at least 2 inches")
            content = write_figure(KINDS[given.kind](block, wishes, given.width), given.out)
        given.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(given.out, content)
    except (UsageError, OSError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 2
    print(printable(given.out))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cl_bench.report.paper", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("what", choices=("table", "figure"))
    parser.add_argument("paths", nargs="+", type=Path, metavar="runs/...")
    parser.add_argument("--out", type=Path, required=True, help=".tex, or .pdf or .svg")
    parser.add_argument("--block", type=int, help="which of several tables of the report, from 1")
    parser.add_argument("--columns", default="", help="acc,bwt,wall_seconds,n,p: metrics and costs")
    parser.add_argument("--rows", default="", help="labels of the report, in this order")
    parser.add_argument(
        "--names",
        nargs="+",
        default=[],
        metavar="GIVEN=SHOWN",
        help="what rows and columns are called",
    )
    parser.add_argument("--label", default="", help="of the table, such as tab:main")
    parser.add_argument("--caption", default="", help="LaTeX in place of our sentence")
    parser.add_argument("--digits", type=int, default=2, choices=range(4), help="of scores")
    parser.add_argument("--kind", choices=tuple(KINDS), default="curve", help="of the figure")
    parser.add_argument("--width", type=float, default=COLUMN, help="of the figure, inches")
    return parser


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _named(pair: str) -> tuple[str, str]:
    # A label of ours may hold a sign of its own: "gpm threshold=0.9=GPM".
    given, equals, shown = pair.rpartition("=")
    if not equals or not given:
        raise UsageError(f"--names {pair}: write GIVEN=SHOWN, such as gpm=GPM")
    return given, shown


def _block(blocks: Sequence[Block], number: int | None) -> Block:
    if number is None and len(blocks) == 1:
        return blocks[0]
    there = "; ".join(
        f"{k} is {b.title}, task id {'' if b.task_id_known else 'not '}known"
        for k, b in enumerate(blocks, start=1)
    )
    if number is None or not 1 <= number <= len(blocks):
        raise UsageError(f"--block {number or '?'}: the report has {len(blocks)} tables: {there}")
    return blocks[number - 1]


if __name__ == "__main__":
    raise SystemExit(main())
