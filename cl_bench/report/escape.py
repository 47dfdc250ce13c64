"""Text from runs as each format of a report shows it: none of it is obeyed.

Names of strategies, streams and tasks, settings and sources may be a stranger's. What is plain text
in one format is a command in another, so every writer escapes for its own.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cl_bench.errors import printable

SCRIPT = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}
MARKDOWN = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
LATEX = {
    "\\": "\\textbackslash{}",
    "{": "\\{",
    "}": "\\}",
    "$": "\\$",
    "&": "\\&",
    "#": "\\#",
    "_": "\\_",
    "%": "\\%",
    "^": "\\textasciicircum{}",
    "~": "\\textasciitilde{}",
    "<": "$<$",
    ">": "$>$",
    "[": "{[}",  # after the end of a row it would be its option
    "]": "{]}",
    "±": "$\\pm$",
    "†": "$^\\dagger$",
    "·": "$\\cdot$",
    "\u00d7": "$\\times$",
    "→": "$\\rightarrow$",
    "\u2212": "$-$",
}
FORMULA = ("=", "+", "-", "@", "\t", "\r")


def shown(value: Any) -> Any:
    """``value`` with what a terminal would obey made visible in every text, at any depth."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {shown(k): shown(v) for k, v in value.items()}
    if isinstance(value, Sequence):
        return [shown(v) for v in value]
    return value


def script(value: Any) -> str:
    """JSON for a ``<script>`` element: no text in it ends the element or opens a comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&]", lambda found: SCRIPT[found[0]], text)


def csv_cell(text: str) -> str:
    """For a table that a spreadsheet may open: an apostrophe stands before a formula."""
    return f"'{text}" if text.startswith(FORMULA) else text


def markdown(text: str) -> str:
    """For a line or a cell of a table: no link, no HTML, no further cell."""
    line = re.sub(r"[\\`*\[\]|!$]", r"\\\g<0>", " ".join(text.split()))
    return re.sub("[&<>]", lambda found: MARKDOWN[found[0]], line)


def latex(text: str) -> str:
    """For running text or a cell: no command, no further cell."""
    return "".join(LATEX.get(c) or _typeset(c) for c in " ".join(text.split()))


def _typeset(character: str) -> str:
    """As it is where every LaTeX has it: ASCII and accented Latin letters; else its number."""
    latin = character.isalpha() and ord(character) < 0x180
    plain = character.isascii() or latin
    return character if plain else f"{{[}}U+{ord(character):04X}{{]}}"
