"""``python -m cl_bench new strategy|stream|model NAME``: one of your own, with its test.

Writes a Python file, a yaml and a test, in the form of ``docs/own_folder``. They run and pass as
they are; what they do is to be replaced.
"""

import argparse
import keyword
import re
import shlex
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from cl_bench.cli.folders import conf_directory
from cl_bench.cli.listing import options
from cl_bench.errors import UsageError

KINDS = ("strategy", "stream", "model")
PACKAGE = "mine"
"""Where the Python file lies, so that no name of yours hides a package."""


def main(words: Sequence[str]) -> int:
    """Write the files and print how to use them; the exit status is 0.

    Raises:
        UsageError: the name is none, is taken, or a file is there already.
    """
    parser = argparse.ArgumentParser(
        prog="python -m cl_bench new",
        description="A strategy, a stream or a model of your own: Python file, yaml and test.",
    )
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("name", metavar="NAME", help="as it is named on a command line, my_rule")
    parser.add_argument("--to", type=Path, default=Path(), help="folder; the current one if none")
    given = parser.parse_args(list(words))
    written = write(given.kind, given.name, given.to)
    for path in written:
        print(path)
    print("\n".join(["", "try it:", *(f"  {line}" for line in commands(given))]))
    return 0


def write(kind: str, name: str, folder: Path) -> list[Path]:
    """Write the files of a kind and return their paths; see :func:`main`."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise UsageError(f"{name}: a name is small letters, digits and _, such as my_rule")
    if name in options([conf_directory()], kind):
        raise UsageError(f"{name}: cl_bench has a {kind} of that name; take another")
    texts = {
        Path(PACKAGE, "__init__.py"): "",
        Path(PACKAGE, f"{name}.py"): _template(f"{kind}.py.txt", name),
        Path("conf", kind, f"{name}.yaml"): _template(f"{kind}.yaml.txt", name),
        Path(f"test_{name}.py"): _template(f"test_{kind}.py.txt", name),
    }
    for path in texts:
        if path.name != "__init__.py" and (folder / path).exists():
            raise UsageError(f"{folder / path} is there already: take another name, or move it")
    written = []
    for path, text in texts.items():
        if not (folder / path).exists():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
            written.append(folder / path)
    return written


def commands(given: argparse.Namespace) -> list[str]:
    """How to run and test what was written."""
    chosen = {
        "strategy": f"+strategy={given.name} +stream=permuted_digits stream.num_tasks=3",
        "stream": f"+strategy=finetune +stream={given.name}",
        "model": f"+strategy=finetune +stream=permuted_digits model={given.name}",
    }[given.kind]
    moved = [] if given.to == Path() else [f"cd {shlex.quote(str(given.to))}"]
    python = Path(sys.executable).name
    run = f"{python} -m cl_bench --config-dir conf {chosen}"
    return [*moved, run, f"{python} -m pytest -q test_{given.name}.py"]


def _template(file: str, name: str) -> str:
    text = (files("cl_bench.cli") / "templates" / file).read_text(encoding="utf-8")
    camel = "".join(part.capitalize() for part in name.split("_"))
    return text.replace("NAME", name).replace("Camel", camel)
