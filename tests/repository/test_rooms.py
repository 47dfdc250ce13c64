"""The rooms of the house: who may import whom."""

import ast
import functools
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ABOVE = (
    "board", "cli", "experiment", "federation", "integrations", "report", "streaming", "tracking",
    "api",
)  # fmt: skip


def modules(room):
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted((ROOT / "cl_bench" / room).rglob("*.py"))
    }


@functools.cache
def imported(path):
    """Full names of what a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.update((node.module, *(f"{node.module}.{a.name}" for a in node.names)))
    return found


FLOORS = (
    ("contracts", "data", "merging", "subspace"),
    ("metrics",),
    (
        "adapters",
        "blocks",
        "learners",
        "models",
        "optimizers",
        "packed",
        "parallel",
        "strategies",
        "tasks",
    ),
    ("features", "report", "tracking"),
    ("board", "experiment", "federation", "integrations", "streaming"),
    ("cli", "api", "__main__", ""),
)
"""From the ground up; the last one is ``cl_bench/__init__.py``, which opens on ``api``."""

PLAIN = {"ends", "errors", "hub", "places", "version"}
"""Modules that import nothing of ours."""


def room(name):
    """Of a module, by its full name; nothing for what lies in ``cl_bench/__init__.py``."""
    return name.split(".")[1] if name.startswith("cl_bench.") else ""


def rooms():
    """Which rooms each room imports, with a file that does; at any time, inside functions too."""
    graph = {}
    for folder in ("", "tasks"):
        for name, path in modules(folder).items():
            for other in imported(path):
                if other.partition(".")[0] == "cl_bench" and room(other) != room(name):
                    graph.setdefault(room(name), {})[room(other)] = path
    return graph


def test_rooms_import_what_lies_below_and_in_no_circle():
    graph = rooms()
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    assert set(graph) - PLAIN <= set(floor), "a room without a floor"
    for name, others in graph.items():
        assert name not in PLAIN, others
        for other, path in others.items():
            below = other in PLAIN or floor[other] <= floor[name]
            assert below, f"{path} imports {other}"
    list(
        graphlib.TopologicalSorter({n: others.keys() for n, others in graph.items()}).static_order()
    )


def test_the_streams_have_one_name_and_no_reader_below_them():
    """Imported as ``cl_bench.tasks`` by whoever is above, never by its folder's own name."""
    assert "cl_bench.tasks.digits" in modules("tasks")
    python = [
        p
        for folder in ("tasks", "cl_bench", "tests", "docs")
        for p in ROOT.glob(f"{folder}/**/*.py")
    ]
    assert len(python) > 300
    for path in python:
        assert not [n for n in imported(path) if n == "tasks" or n.startswith("tasks.")], path
    below = {name for name, others in rooms().items() if "tasks" in others}
    assert below <= {"features", "cli", "experiment", "federation", "integrations", "api"}


@pytest.mark.parametrize(
    ("room", "foreign"),
    [
        ("parallel", (*ABOVE, "learners", "packed", "strategies", "models", "tasks")),
        ("packed", (*ABOVE, "learners", "parallel", "strategies", "models", "tasks")),
        ("learners", (*ABOVE, "strategies", "models", "tasks")),
        ("strategies", (*ABOVE, "learners", "packed", "parallel", "models", "tasks")),
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


def graph(files):
    """Which of the modules each imports: of ``from package import module``, the module alone."""
    found = {}
    for name, path in files.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    deeper = f"{node.module}.{alias.name}"
                    names.add(deeper if deeper in files else node.module)
        found[name] = names & files.keys() - {name}
    return found


def require_no_circle(edges):
    list(graphlib.TopologicalSorter(edges).static_order())


def test_modules_import_in_no_circle():
    """Neither where they are loaded nor inside functions."""
    require_no_circle(graph(modules("")))


def test_rooms_import_in_no_circle():
    def room(name):
        return ".".join(name.split(".")[:2])

    edges = {}
    for name, targets in graph(modules("")).items():
        edges.setdefault(room(name), set()).update({room(t) for t in targets} - {room(name)})
    require_no_circle(edges)


def test_a_circle_is_seen_inside_functions_and_through_packages(tmp_path):
    texts = {
        "room": "",
        "room.upper": "from room import lower",
        "room.lower": "def late():\n    from room.upper import name",
        "room.alone": "import json\nfrom room.upper import name",
    }
    files = {name: tmp_path / name for name in texts}
    for name, text in texts.items():
        files[name].write_text(text)
    assert graph(files)["room.alone"] == {"room.upper"}
    with pytest.raises(graphlib.CycleError, match="room"):
        require_no_circle(graph(files))
    files["room.lower"].write_text("")
    require_no_circle(graph(files))


def test_starting_processes_does_not_build_runs():
    """The child builds; who starts it hands the job over as data."""
    assert not {n for n in imported(modules("cli")["cl_bench.cli.together"]) if ".build" in n}
