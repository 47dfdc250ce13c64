"""What there is to run, read from the configs' first comment lines."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from cl_bench.cli.words import COMMANDS
from cl_bench.places import options

__all__ = ["describe", "options", "print_listing"]

GROUPS = {
    "strategy": ("strategies", "+strategy=...", "what an update may do"),
    "stream": ("streams", "+stream=...", "the tasks, one after another"),
    "backbone": (
        "backbones",
        "+backbone=...",
        "frozen, its features kept; model=features or an mlp",
    ),
    "schedule": ("schedules", "schedule=...", "the learning rate within a task"),
    "probe": ("probes", "probe.<name>.enabled=true", "what else to measure"),
    "model": ("models", "model=...", "a stream brings its default"),
    "protocol": (
        "protocols",
        "+protocol=...",
        "a stream and how a paper learns it, for any strategy",
    ),
    "experiment": ("experiments", "+experiment=...", "a published setting and its numbers"),
    "search": (
        "searches",
        "-m +search=...",
        "hyperparameters, on validation data of the first tasks",
    ),
    "cluster": ("clusters", "-m +cluster=...", "where the jobs of a sweep run"),
    "federation": ("federations", "+federation=...", "clients that share no data, and a server"),
    "engine": ("engines", "+engine=...", "another loop than epochs of batches"),
    "also": ("companions", "+also=...", "join a strategy; several: +also=[er,ewc]"),
}
"""Title, how to choose one, and what they are."""

EXAMPLES = (
    "python -m cl_bench +strategy=gpm +stream=permuted_digits",
    "python -m cl_bench +strategy=gpm +stream=split_digits strategy.threshold=0.97",
    "python -m cl_bench -m +strategy=finetune,gpm +stream=permuted_digits seed=0,1",
    "python -m cl_bench +strategy=gpm +stream=permuted_digits --cfg job",
)

WIDTH = 120
"""Columns the listing takes at most."""


def print_listing(directories: Sequence[Path], console: Console) -> None:
    """One entry for everything that can be named, and examples.

    Args:
        directories: the folders of Hydra's search path.
        console: where to print.
    """
    found = {group: options(directories, group) for group in GROUPS}
    indent = 4 + max((len(name) for names in found.values() for name in names), default=0)
    room = max(min(console.width, WIDTH) - indent, 20)
    console.print(Text("cl_bench: continual-learning experiments", style="bold"))
    for group, (title, choose, meaning) in GROUPS.items():
        if not found[group]:
            continue
        console.print(Text.assemble("\n", (title, "bold"), f"  {choose}  ", (meaning, "dim")))
        for name, path in sorted(found[group].items()):
            first, *rest = textwrap.wrap(describe(path), room) or [""]
            console.print(Text.assemble("  ", (name.ljust(indent - 2), "cyan"), first))
            for line in rest:
                console.print(Text(" " * indent + line))
    console.print(Text.assemble("\n", ("commands", "bold"), "  python -m cl_bench <command> ..."))
    for word, (_, _, meaning) in COMMANDS.items():
        console.print(Text.assemble("  ", (word.ljust(indent - 2), "cyan"), meaning))
    remark = ("the last one prints every setting and runs nothing", "dim")
    console.print(Text.assemble("\n", ("examples", "bold"), "  ", remark))
    for example in EXAMPLES:
        # Soft wrap: a command that the terminal breaks can still be copied in one piece.
        console.print(Text(f"  {example}"), soft_wrap=True)


def describe(path: Path) -> str:
    """The second comment line of a config (the first is its command): one line on what it is."""
    comments = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comments.append(line.lstrip("# ").strip())
    said = [comment for comment in comments if not comment.startswith("@package")]
    return said[1] if len(said) > 1 else ""
