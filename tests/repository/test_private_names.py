"""Private names of other libraries: those that are used are listed in docs/architecture.md."""

import ast
import re
import sys
from pathlib import Path

import lightning
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "cl_bench"
OURS = ("cl_bench", "tasks")
SGD = torch.optim.SGD([torch.zeros(1)])
THEIRS = {
    name
    for known in (
        SGD,
        torch.optim.lr_scheduler.LambdaLR(SGD, lambda epoch: 1.0),
        torch.zeros(1),
        nn.Conv2d(1, 1, 1),
        nn.BatchNorm1d(1),
        lightning.LightningModule(),
        lightning.Trainer,
    )
    for name in dir(known)
}
"""Attributes of other libraries' objects that our code has in hand."""


def is_private(name):
    """``_name``; configurations have ``_target_``, Python has ``__name__``."""
    return name.startswith("_") and not name.endswith("_")


def own_names(trees):
    """What the code itself defines under a private name."""
    found = set()
    for node in (n for tree in trees for n in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return found


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def foreign_names(tree, own, listed=()):
    """Private imports, attributes that are not ours or theirs too, and listed methods overridden.

    An object's own attributes, ``self._name``, are its own where the code defines such a name.
    """
    for name in imports(tree):
        top, *rest = name.split(".")
        if top not in (*OURS, *sys.stdlib_module_names) and any(map(is_private, rest)):
            yield name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name, owner = node.attr, getattr(node.value, "id", "")
            theirs = name in THEIRS or name in listed
            foreign = name not in own or (theirs and owner != "self")
            if is_private(name) and foreign and owner not in sys.stdlib_module_names:
                yield name
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
            name = getattr(node.args[1], "value", None)
            if isinstance(name, str) and is_private(name) and name not in own:
                yield name
        elif isinstance(node, ast.ClassDef):
            yield from (n.name for n in node.body if getattr(n, "name", "") in listed)


def table(text):
    """``(name, file)`` of every row."""
    rows = text.partition("though it is not public")[2].splitlines()
    found = set()
    for row in rows:
        if row.startswith("| `"):
            names, files = (re.findall(r"`([^`]+)`", cell) for cell in row.split("|")[1:3])
            found |= {(name, file) for name in names for file in files}
    return found


def test_the_table_lists_what_is_used_and_nothing_else():
    paths = [*PACKAGE.rglob("*.py"), *(ROOT / "tasks").rglob("*.py")]
    trees = {path: ast.parse(path.read_text()) for path in paths}
    listed = table((ROOT / "docs" / "architecture.md").read_text())
    names, own = {name for name, _ in listed}, own_names(trees.values())
    used = {
        (name, str(path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT)))
        for path, tree in trees.items()
        for name in foreign_names(tree, own, names)
    }
    assert used == listed


def test_private_names_are_seen_wherever_they_are_used():
    text = """
import torch._C
import _thread
from torch.nn.modules.batchnorm import _BatchNorm
from cl_bench.room import _ours
class Own(_BatchNorm):
    def _hook(self): self._mine = os._exit
    def look(self, x): return x._base, x._mine, getattr(x, "_hidden", None), cfg._target_, x.__len__
    def _parameters(self): return self._parameters, other._parameters
"""
    tree = ast.parse(text)
    found = set(foreign_names(tree, own_names([tree])))
    names = {"torch._C", "torch.nn.modules.batchnorm._BatchNorm", "_base", "_hidden", "_parameters"}
    assert found == names
    assert set(foreign_names(tree, own_names([tree]), ["_hook", "_mine"])) == {
        *names,
        "_hook",
        "_mine",
    }


def test_the_table_is_read_by_rows():
    text = "## What is used though it is not public\n| `_a`, `b._c` | `x.py`, `y.py` | `_no` |"
    assert table(text) == {(n, f) for n in ("_a", "b._c") for f in ("x.py", "y.py")}
