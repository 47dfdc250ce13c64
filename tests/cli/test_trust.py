"""A run's directory may be a stranger's: nothing in it runs, is followed, or is evaluated."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from cl_bench.cli.build import build
from cl_bench.cli.kinds import SLOTS
from cl_bench.cli.recorded import read_recorded
from cl_bench.cli.resume import resume
from cl_bench.cli.run import run_config
from cl_bench.cli.trust import Trust, read_trust, require_trusted
from cl_bench.errors import UsageError, printable
from cl_bench.tracking.environment import describe_environment
from cl_bench.tracking.files import open_file, read_text, require_plain, write_atomically

CONF = Path(__file__).parents[2] / "conf"
SGD = {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.1}
GPM = {"_target_": "cl_bench.strategies.projection.gpm.GPM", "threshold": 0.9}


def record(directory, **config):
    """The directory of a run, as far as it is read before anything of it is built."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(yaml.safe_dump({"seed": 0, **config}))
    (directory / "command.txt").write_text("python -m cl_bench\n")
    (directory / "environment.json").write_text("{}")
    return directory


def read(directory, *words):
    trust, _ = read_trust([f"trust={word}" for word in words])
    return read_recorded("resume", directory, trust)


# --- whose code --------------------------------------------------------------------------------

SHELL = {"_target_": "os.system", "command": "exit 1"}

HOSTILE = {
    "a slot of its own": {"schedule": SHELL},
    "a nested argument": {"optimizer": {**SGD, "momentum": SHELL}},
    "a list": {"model": {"_target_": "cl_bench.models.MLP", "hidden": [8, [SHELL]]}},
    "positional arguments": {"optimizer": {**SGD, "_args_": [SHELL]}},
    "not recursive": {"strategy": {**GPM, "_recursive_": False, "protect": {"a": {"b": SHELL}}}},
    "a companion": {"also": {"er": SHELL}},
    "a companion's part": {"also": {"er": {**GPM, "protect": SHELL}}},
    "companions as a list": {"also": [SHELL]},
    "partial": {"optimizer": {"_target_": "functools.partial", "_args_": ["os.system", "exit 1"]}},
    "an alias": {"model": {"_target_": "torch.os.system", "command": "exit 1"}},
    "eval": {"stream": {"_target_": "builtins.eval", "_args_": ["1"]}},
    "a pickle": {"model": {"_target_": "torch.load", "f": "x.pt", "weights_only": False}},
    "the hub": {"model": {"_target_": "torch.hub.load", "repo_or_dir": "x", "model": "y"}},
    "a loader of the kind": {
        "learner": {"_target_": "cl_bench.learners.Classifier.load_from_checkpoint"}
    },
    "an annotated function that runs its text": {
        "model": {
            "_target_": "torch.fx.graph_module.reduce_graph_module",
            "body": {"_code": "def forward(self): pass"},
            "import_block": "import os",
        }
    },
    "ours, but no factory": {"model": {"_target_": "cl_bench.cli.build.build_model", "cfg": {}}},
    "hydra": {"strategy": {"_target_": "hydra.utils.instantiate", "config": {}}},
    "hydra's names": {"optimizer": {**SGD, "lr": {"_target_": "hydra.utils.get_method"}}},
    "a plugin of another kind": {
        "trainer": {
            "_target_": "lightning.Trainer",
            "plugins": [{"_target_": "pandas.read_pickle"}],
        }
    },
    "a Trainer's strategy": {
        "trainer": {"_target_": "lightning.Trainer", "strategy": {"_target_": "torch.nn.Linear"}}
    },
    "a class of another kind": {"optimizer": {"_target_": "torch.nn.Linear"}},
    "a library, by its name alone": {"model": {"_target_": "torch.ctypes.cdll./tmp/library"}},
    "through an instance": {"model": {"_target_": "torch.ctypes.cdll.library"}},
    "no name": {"model": {"_target_": ["os.system"]}},
    "a script": {"model": {"_target_": "lightning.__main__.x"}},
    "the server": {
        "federation": {"_target_": "cl_bench.federation.Federation", "server": {**SHELL}}
    },
    "no group": {"strategy": "os.system"},
}


@pytest.mark.parametrize("config", HOSTILE.values(), ids=HOSTILE)
def test_a_record_cannot_have_other_code_called(tmp_path, config, monkeypatch):
    def called(*_, **__):
        pytest.fail("it was called")

    for name in ("os.system", "torch.load", "torch.hub.load", "ctypes.CDLL.__init__"):
        monkeypatch.setattr(name, called)
    with pytest.raises(UsageError, match=r"resume=.*config\.yaml"):
        read(record(tmp_path / "run", **config))


def test_what_we_ship_may_be_named():
    """Every ``_target_`` in our own configurations, where it stands."""
    seen = 0
    for slot in SLOTS:
        for path in sorted((CONF / slot).rglob("*.yaml")):
            node = OmegaConf.to_container(OmegaConf.load(path))
            node = node.get(slot, node)
            node.pop("defaults", None)
            require_trusted({slot: node}, Path("run"), "resume", Trust())
            seen += "_target_" in node
    assert seen > 50
    server = {"_target_": "torch.optim.Adam", "_partial_": True, "lr": 0.01}
    federation = {"_target_": "cl_bench.federation.Federation", "server": server}
    require_trusted({"federation": federation}, Path("run"), "resume", Trust())


OWN = """
import os
from torch import nn
from cl_bench.contracts import Strategy

with open({proof!r}, "a") as file:
    file.write("imported")

class Mine(Strategy):
    def __init__(self, part=None):
        pass

class Part:
    pass

def network() -> nn.Module:
    return nn.Flatten()

def wipe():
    raise AssertionError("called")
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of somebody's in the working directory, and what it leaves when it is imported."""
    proof = tmp_path / "proof"
    folder = tmp_path / "folder"
    folder.mkdir()
    name = f"own_{tmp_path.name}"
    (folder / f"{name}.py").write_text(OWN.format(proof=str(proof)))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    yield name, folder, proof
    sys.modules.pop(name, None)


def test_own_code_is_imported_from_folders_that_the_command_line_names(tmp_path, own):
    name, folder, proof = own
    strategy = {"_target_": f"{name}.Mine", "part": {"_target_": f"{name}.Part"}}
    run = record(tmp_path / "run", strategy=strategy, model={"_target_": f"{name}.network"})
    with pytest.raises(UsageError, match=rf"it has not been run; .* add trust={folder}"):
        read(run)
    assert not proof.exists()
    before = list(sys.path)
    assert read(run, folder).trust.folders == (folder,)
    assert proof.read_text() == "imported"
    assert sys.path == before


def test_trust_in_a_folder_is_no_trust_in_all_it_can_reach(tmp_path, own):
    name, folder, _ = own
    for target in (f"{name}.wipe", f"{name}.os.system", f"{name}.Part"):
        run = record(tmp_path / "run", strategy={"_target_": target})
        with pytest.raises(UsageError, match=f"if you know what {target} does|Python's own"):
            read(run, folder)
    run = record(tmp_path / "run", strategy={"_target_": f"{name}.wipe"})
    assert read(run, folder, f"{name}.wipe").cfg.strategy._target_ == f"{name}.wipe"
    with pytest.raises(UsageError, match="trust=nowhere: there is no such folder"):
        read(run, "nowhere")


@pytest.mark.parametrize("below", [False, True])
def test_code_in_the_directory_of_a_run_is_not_imported(tmp_path, own, below):
    _, folder, proof = own
    run = record(folder / "stranger", strategy={"_target_": "stranger.code.Mine"})
    (run / "code.py").write_text(OWN.format(proof=str(proof)))
    if below:
        (run / "__init__.py").write_text(OWN.format(proof=str(proof)))
    for words in ((), (folder,)):
        with pytest.raises(UsageError, match="neither installed nor vouched for"):
            read(run, *words)
    (run / "environment.json").write_text(json.dumps({"directory": str(run)}))
    (run / "config.yaml").write_text(yaml.safe_dump({"strategy": {"_target_": "code.Mine"}}))
    with pytest.raises(UsageError, match="Python's own"):
        read(run)
    assert not proof.exists()


def test_modules_do_not_come_from_where_a_record_says_the_run_began(tmp_path, own):
    _, folder, _ = own
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run = record(tmp_path / "run")
    (run / "environment.json").write_text(json.dumps({"directory": str(elsewhere)}))
    with read(run).surroundings():
        assert Path.cwd() == elsewhere
        assert str(elsewhere) not in sys.path
        assert "" not in sys.path
        assert str(folder) in sys.path  # what "" stood for when the command began
        # An installed network that loads a file the record names gets no pickle.
        torch.save({"f": functools.partial(print)}, tmp_path / "pickle.pt")
        with pytest.raises(Exception, match="weights_only"):
            torch.load(tmp_path / "pickle.pt", weights_only=False)
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    for threads in (0, -1, 10**9, "two", None):
        (run / "environment.json").write_text(json.dumps({"threads": threads}))
        with pytest.raises(UsageError, match="is damaged: threads="), read(run).surroundings():
            pass


@pytest.mark.parametrize("inside", [True, False])
def test_a_record_does_not_choose_the_server_that_gets_the_key(tmp_path, inside):
    there = tmp_path / "there"
    run = record(tmp_path / "run", logger={"mode": "online"})
    (run / "environment.json").write_text(json.dumps({"directory": str(there)}))
    settings = (run if inside else there) / "wandb/settings"
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nbase_url = http://127.0.0.1:9\n")
    with (
        pytest.raises(UsageError, match="would choose the server that your W&B key"),
        read(run).surroundings(),
    ):
        pass
    settings.unlink()
    with read(run).surroundings():
        pass


# --- a fresh run: the same kinds, said before anything is built ----------------------------------


@pytest.mark.parametrize(
    ("slot", "target", "said"),
    [
        ("optimizer", "torch.nn.Linear", "makes no optimizer; name a subclass of torch.optim"),
        ("trainer", "builtins.dict", "makes no Trainer"),
        ("learner", "builtins.dict", "makes no learner"),
        ("strategy", "cl_bench.models.MLP", "makes no strategy"),
        ("schedule", "torch.optim.SGD", "makes no schedule"),
        ("model", "cl_bench.learners.language", "takes|language|arguments"),
        ("stream", "time.time", "makes no stream"),
    ],
)
def test_a_slot_takes_its_own_kind(slot, target, said):
    cfg = OmegaConf.create({slot: {"_target_": target}})
    with pytest.raises(UsageError, match=said):
        build(cfg[slot])


def numbers():
    return 3


def test_a_function_that_does_not_say_is_judged_by_what_it_makes():
    cfg = OmegaConf.create({"strategy": {"_target_": f"{__name__}.numbers"}})
    with pytest.raises(UsageError, match=r"strategy\._target_=.*it made a int"):
        build(cfg.strategy)
    assert build(OmegaConf.create({"_target_": f"{__name__}.numbers"})) == 3  # no slot, no kind


# --- values, not expressions -------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["${oc.env:CL_BENCH_SECRET}", "a ${hydra:job.num}", "${oc.decode:x}", "${.seed}"]
)
def test_expressions_of_a_record_are_not_evaluated(tmp_path, monkeypatch, text):
    monkeypatch.setenv("CL_BENCH_SECRET", "hunter2")
    run = record(tmp_path / "run", logger={"tags": ["a", text]})
    with pytest.raises(UsageError, match=r"logger\.tags\.1=.* is an expression") as raised:
        read(run)
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]\n",
        "[" * 10_000,
        "a: " + "{b: " * 100 + "1" + "}" * 100,
        "- 1\n",
        "a: [",
        "!!python/object/apply:os.system [exit 1]",
        "a: " + "x" * 2**22,
    ],
    ids=["aliases", "endless", "deep", "a list", "broken", "python", "huge"],
)
def test_a_configuration_that_is_none_is_refused(tmp_path, text):
    run = record(tmp_path / "run")
    (run / "config.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"is damaged|holds no configuration of a run"):
        read(run)


# --- links, pipes, endless files ----------------------------------------------------------------


@pytest.fixture
def victim(tmp_path):
    path = tmp_path / "victim"
    path.mkdir()
    (path / "task0009.safetensors").write_text("precious")
    yield path
    assert (path / "task0009.safetensors").read_text() == "precious"
    assert len(list(path.iterdir())) == 1


@pytest.mark.parametrize(
    "name",
    ["config.yaml", "results.jsonl", "run.lock", "checkpoints", "weights", "wandb", "summary.json"],
)
def test_a_link_in_a_run_is_not_followed(tmp_path, victim, name):
    run = record(tmp_path / "run")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(victim if "." not in name else victim / "task0009.safetensors")
    for start in (
        lambda: resume([f"resume={run}"]),
        lambda: run_config(
            OmegaConf.create({"run_dir": str(run), "trainer": {"accelerator": "cpu"}}), "", {}
        ),
    ):
        with pytest.raises(UsageError, match=f"{name} is no plain file or folder"):
            start()


def test_a_link_deeper_down_and_a_pipe(tmp_path, victim):
    run = record(tmp_path / "run")
    (run / "weights").mkdir()
    (run / "weights/task0001.safetensors").symlink_to(victim / "task0009.safetensors")
    with pytest.raises(UsageError, match=r"weights/task0001\.safetensors is no plain"):
        require_plain(run)
    (run / "weights/task0001.safetensors").unlink()
    require_plain(run)
    (tmp_path / "latest").symlink_to(run)
    require_plain(tmp_path / "latest")  # how the user gets there is the user's
    os.mkfifo(run / "choices.json")
    for attempt in (lambda: require_plain(run), lambda: open_file(run / "choices.json")):
        with pytest.raises(UsageError, match="pipe"):
            attempt()


def test_a_file_is_written_beside_a_link_that_lies_in_wait(tmp_path, victim):
    target = tmp_path / "report.html"
    for name in (".report.html.tmp", "report.html"):
        (tmp_path / name).symlink_to(victim / "task0009.safetensors")
    write_atomically(target, b"new")
    assert target.read_bytes() == b"new"
    assert not target.is_symlink()


def test_an_endless_file_is_not_read(tmp_path):
    path = tmp_path / "results.jsonl"
    with path.open("wb") as file:
        file.truncate(10**12)  # takes no room on the disk
    with pytest.raises(UsageError, match="larger than 256 MiB"):
        read_text(path)


def test_git_starts_no_program_of_the_directory_that_a_record_names(tmp_path, monkeypatch):
    proof = tmp_path / "proof"
    repository = tmp_path / "repository"
    git = functools.partial(subprocess.run, cwd=repository, check=True, capture_output=True)
    repository.mkdir()
    git(["git", "init", "-q"])
    (repository / "file").write_text("text")
    git(["git", "add", "file"])
    git(["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "first"])
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {proof}\ncat\n")
    program.chmod(0o755)
    (repository / ".gitattributes").write_text("* filter=evil\n")
    git(["git", "config", "core.fsmonitor", str(program)])
    for step in ("clean", "process"):
        git(["git", "config", f"filter.evil.{step}", str(program)])
    git(["git", "config", "filter.evil.required", "true"])
    (repository / "file").write_text("other")
    proof.unlink(missing_ok=True)
    monkeypatch.chdir(repository)
    assert describe_environment()["git"]["dirty"] is True
    assert not proof.exists()


def test_what_a_terminal_obeys_is_made_visible():
    assert printable("\x1b]0;owned\x07\u202egpm\n") == "\\x1b]0;owned\\x07\\u202egpm\n"
    assert printable("Größe 3 µm, 学习 ±") == "Größe 3 µm, 学习 ±"
