"""What there is to run, read from the configs' first comment lines."""

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

GROUPS = {
    "strategy": "strategies  (+strategy=...)",
    "stream": "streams  (+stream=...)",
    "model": "models  (model=...)",
    "experiment": "experiments  (+experiment=...): published settings",
    "also": "companions  (+also=...): join a strategy",
}


def print_listing(directories: list[Path], console: Console) -> None:
    """One line for everything that can be named, and an example.

    Args:
        directories: the folders of Hydra's search path.
        console: where to print.
    """
    console.print("[bold]cl_bench[/bold]: continual-learning experiments\n")
    for group, title in GROUPS.items():
        options = sorted(_options(directories, group))
        if not options:
            continue
        table = Table(title=title, title_justify="left", title_style="bold", box=None)
        table.add_column(style="cyan", no_wrap=True, min_width=18)
        table.add_column()
        for name, description in options:
            table.add_row(name, description)
        table.show_header = False
        console.print(table)
        console.print()
    console.print("[bold]examples[/bold]")
    for example in (
        "python -m cl_bench +strategy=gpm +stream=permuted_digits",
        "python -m cl_bench -m +strategy=finetune,gpm +stream=permuted_digits seed=0,1,2",
        "python -m cl_bench +strategy=gpm +stream=permuted_digits --cfg job   # every setting",
    ):
        console.print(f"  {example}", highlight=False, soft_wrap=True)


def _options(directories: list[Path], group: str) -> Iterator[tuple[str, str]]:
    for directory in directories:
        for path in (directory / group).rglob("*.yaml"):
            name = path.relative_to(directory / group).with_suffix("").as_posix()
            yield name, describe(path)


def describe(path: Path) -> str:
    """The second comment line of a config (the first is its command): one line on what it is."""
    comments = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        comments.append(line.lstrip("# ").strip())
    said = [comment for comment in comments if not comment.startswith("@package")]
    return said[1] if len(said) > 1 else ""
