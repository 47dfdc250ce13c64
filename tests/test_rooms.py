"""The rooms that processes, packs and learners live in: who may import whom."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ABOVE = ("cli", "experiment", "federation", "integrations", "report", "tracking", "api")


def modules(room):
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted((ROOT / "cl_bench" / room).rglob("*.py"))
    }


def imported(path):
    """Full names of what a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.update((node.module, *(f"{node.module}.{a.name}" for a in node.names)))
    return found


@pytest.mark.parametrize(
    ("room", "foreign"),
    [
        ("parallel", (*ABOVE, "learners", "packed", "strategies", "models")),
        ("packed", (*ABOVE, "learners", "parallel", "strategies", "models")),
        ("learners", (*ABOVE, "strategies", "models")),
    ],
)
def test_imports_point_down(room, foreign):
    rooms = tuple(f"cl_bench.{name}" for name in foreign)
    for path in modules(room).values():
        assert not [n for n in imported(path) if n.startswith(rooms)], path


def test_packs_are_reached_through_the_rooms_door_alone():
    for name, path in modules("").items():
        if not name.startswith("cl_bench.packed"):
            inner = [n for n in imported(path) if n.startswith("cl_bench.packed.")]
            names = {"Packs", "ShortSteps", "check_packs", "learn_pack"}
            assert {n.removeprefix("cl_bench.packed.") for n in inner} <= names, path


@pytest.mark.parametrize("room", ["learners", "packed", "parallel"])
def test_modules_of_a_room_import_in_no_circle(room):
    own = modules(room)
    graph = {name: imported(path) & own.keys() - {name} for name, path in own.items()}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_starting_processes_does_not_build_runs():
    """The child builds; who starts it hands the job over as data."""
    assert not {n for n in imported(modules("cli")["cl_bench.cli.together"]) if ".build" in n}
