"""Update rules, a family a folder, one file a method: ``from cl_bench.strategies import GPM``.

A method is imported when somebody asks for it, and none pulls in another's packages. Nobody lists
them: a class is looked for in the files of the families.
"""

import re
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

FAMILIES = Path(__file__).parent


@cache
def modules() -> dict[str, str]:
    """Where in this package each class is that a family defines, by its name."""
    found = {}
    for path in sorted(FAMILIES.glob("*/*.py")):
        for name in re.findall(r"^class ([A-Z]\w*)\(", path.read_text("utf-8"), re.MULTILINE):
            found[name] = f"{path.parent.name}.{path.stem}"
    return found


def __getattr__(name: str) -> Any:
    if name not in modules():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{modules()[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *modules()})
