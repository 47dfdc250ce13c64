"""What the command line says to the person at the keyboard."""

import sys

from rich.console import Console

from cl_bench.errors import printable


def notes(error: BaseException) -> str:
    """What was added to an error on its way up."""
    return "; ".join(getattr(error, "__notes__", []))


def say_error(message: str) -> None:
    """One line, on the error output."""
    say(f"error: {message}", "bold red")


def say(message: str, style: str) -> None:
    """On the error output, below what was printed so far."""
    sys.stdout.flush()
    message = printable(message)
    Console(stderr=True).print(message, style=style, highlight=False, markup=False, soft_wrap=True)
