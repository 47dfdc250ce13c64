"""Commands whose first word says what they do: ``python -m cl_bench report runs/...``."""

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module

from cl_bench.cli.signals import deferred
from cl_bench.errors import UsageError

COMMANDS = {
    "report": ("cl_bench.report.__main__", "runs/...", "tables and a page from runs"),
    "merge": (
        "cl_bench.cli.merge",
        "base=... models=[...] rule=... to=...",
        "checkpoints into one",
    ),
    "board": ("cl_bench.board.command", "[run|verify|add]", "declared protocols and their cells"),
    "new": ("cl_bench.cli.new", "strategy|stream|model NAME", "one of your own, with its test"),
    "doctor": ("cl_bench.cli.doctor", "", "what of this machine a run will find"),
}
"""Module that has ``main(words) -> int``, what follows the word, and what it does."""


def command(arguments: Sequence[str]) -> Callable[[Sequence[str]], int] | None:
    """What the first word calls, if it is one of ours.

    Raises:
        UsageError: it is neither a command, nor an override, nor a flag.
    """
    first = arguments[0] if arguments else ""
    if first in COMMANDS:
        with deferred():
            found: Callable[[Sequence[str]], int] = import_module(COMMANDS[first][0]).main
        return found
    if first.isidentifier():
        near = get_close_matches(first, COMMANDS, 1)
        raise UsageError(
            f"{first}: there is no such command; there are {', '.join(COMMANDS)}"
            + (f" (did you mean {near[0]}?)" if near else "")
            + ", and a run is named by key=value"
        )
    return None
