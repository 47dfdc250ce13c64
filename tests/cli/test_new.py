"""What ``new`` writes runs, passes its own test, and keeps the laws of every strategy."""

import importlib
import inspect
import sys

import cases
import laws
import pytest

from cl_bench.cli.compose import composed
from cl_bench.cli.new import KINDS, write
from cl_bench.errors import UsageError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a beginner stands: on the import path; runs leave pictures out."""
    conduct = importlib.import_module("cl_bench.experiment.conduct")
    for name in ("write_figures", "write_probe_figures"):
        monkeypatch.setattr(conduct, name, lambda directory: [])
    monkeypatch.setattr(conduct, "print_run", lambda directory, console: None)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    for name in [n for n in before if n.partition(".")[0] == "mine"]:
        monkeypatch.delitem(sys.modules, name)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("mine", *(f"test_my_{kind}" for kind in KINDS)):
            del sys.modules[name]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_passes_its_own_test(kind, folder, cli):
    status, out, err = cli("new", kind, f"my_{kind}")
    assert status == 0, err
    for path in (f"mine/my_{kind}.py", f"conf/{kind}/my_{kind}.yaml", f"test_my_{kind}.py"):
        assert (folder / path).is_file()
        assert path in out
    tests = importlib.import_module(f"test_my_{kind}")
    found = {n: f for n, f in vars(tests).items() if n.startswith("test_")}
    assert len(found) >= 2
    for name, function in found.items():
        function(*[folder / name] * len(inspect.signature(function).parameters))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_printed_is_a_run(kind, folder, cli):
    words = cli("new", kind, f"my_{kind}")[1].split("--config-dir conf ")[1].splitlines()[0].split()
    cfg, _ = composed([f"hydra.searchpath=[file://{folder}/conf]", *words])
    assert cfg[kind]._target_ == f"mine.my_{kind}.My{kind.capitalize()}"


def test_a_new_strategy_keeps_the_laws(folder, monkeypatch):
    write("strategy", "my_rule", folder)
    monkeypatch.setattr(cases, "CONF", folder / "conf/strategy")
    monkeypatch.setattr(cases, "NAMES", ["my_rule"])
    laws.state_round_trip("my_rule")
    laws.kill_and_resume("my_rule", folder / "killed")
    alone = laws.whole_run("my_rule", folder / "alone")
    laws.accumulation("my_rule", alone, folder / "halves")
    laws.packed("my_rule", alone, folder / "packed")
    laws.half_precision("my_rule", folder / "bf16")
    laws.no_trace("my_rule")


def test_two_live_in_one_folder_and_nothing_is_written_over(folder):
    write("strategy", "one", folder)
    assert folder / "mine/__init__.py" not in write("model", "two", folder)
    (folder / "conf/stream").mkdir()
    (folder / "conf/stream/three.yaml").write_text("mine")
    for kind, name, said in (
        ("strategy", "one", r"one\.py is there already"),
        ("stream", "three", r"three\.yaml is there already"),
        ("strategy", "gpm", "cl_bench has a strategy of that name"),
        ("model", "My-Net", "small letters"),
        ("model", "class", "small letters"),
    ):
        with pytest.raises(UsageError, match=said):
            write(kind, name, folder)
    assert (folder / "conf/stream/three.yaml").read_text() == "mine"
    assert not (folder / "mine/three.py").exists()
