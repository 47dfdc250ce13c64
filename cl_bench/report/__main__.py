"""``python -m cl_bench report runs/...``: tables and a page from one run, several, or a sweep."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from cl_bench.contracts import UsageError
from cl_bench.errors import printable
from cl_bench.report.compare import print_study, to_csv, to_latex, to_markdown
from cl_bench.report.page import render_page
from cl_bench.report.published import published_tables
from cl_bench.report.study import read_study
from cl_bench.tracking import write_atomically

NAMES = ("report.html", "report.csv", "report.md", "report.tex")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables of the runs that the arguments name, and write them beside a page.

    Returns:
        The exit status: 0, or 2 after an error that the user can put right.
    """
    parser = argparse.ArgumentParser(
        prog="python -m cl_bench report",
        description="Tables and a page from runs: one, several, or all under a directory.",
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="runs/...", help="what to report on")
    parser.add_argument(
        "--out", type=Path, help=f"folder for {', '.join(NAMES)}; the first path by default"
    )
    parser.add_argument(
        "--published",
        action="store_true",
        help="say what the published numbers are, and whether ours lie beside them",
    )
    given = parser.parse_args(arguments)
    console = Console()
    try:
        study = read_study(given.paths)
        out = given.out or given.paths[0]
        texts = [render_page(study, given.paths), to_csv(study), to_markdown(study)]
        try:
            out.mkdir(parents=True, exist_ok=True)
            for name, text in zip(NAMES, [*texts, to_latex(study)], strict=True):
                write_atomically(out / name, text.encode())
        except OSError as error:
            raise UsageError(f"--out {out}: cannot write there ({error.strerror})") from None
    except UsageError as error:
        console = Console(stderr=True)
        console.print(printable(f"error: {error}"), style="bold red", markup=False, soft_wrap=True)
        return 2
    print_study(study, console)
    for table in published_tables(study) if given.published else ():
        console.print(table)
        console.print()
    written = Text(printable(f"{out / NAMES[0]}  and {', '.join(NAMES[1:])} beside it"))
    console.print(written, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
