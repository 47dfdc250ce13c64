"""The command line as its users meet it: what it prints, leaves behind and returns."""

import itertools
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import hydra
import numpy as np
import pytest
from commands import ENVIRONMENT, PLAIN, finish, start, summary
from omegaconf import OmegaConf

from cl_bench.cli.folders import conf_directory
from cl_bench.tracking import read_matrix

ROOT = Path(__file__).resolve().parents[2]

FILES = {
    "accuracy_matrix.csv",
    "accuracy_matrix.png",
    "command.txt",
    "config.yaml",
    "data.json",
    "environment.json",
    "forgetting.png",
    "layers.csv",
    "results.jsonl",
    "summary.json",
}


def compose(*overrides):
    with hydra.initialize_config_dir(str(conf_directory()), version_base="1.3"):
        return hydra.compose("config", list(overrides))


# --- listing --------------------------------------------------------------------------------------


def test_without_arguments_it_lists_what_there_is(tmp_path):
    code = (
        "import sys, time; sys.argv = ['cl_bench']\n"
        "from cl_bench.cli import main; status = main()\n"
        "print('torch' in sys.modules, time.process_time() < 2, status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.stderr == ""
    *lines, last = done.stdout.splitlines()
    assert last == "False True 0"
    text = "\n".join(lines)
    for title in ("strategies", "streams", "models", "experiments", "companions", "examples"):
        assert f"\n{title}  " in text
    for group in ("strategy", "stream", "model", "experiment", "also"):
        for path in (ROOT / "conf" / group).glob("[!_]*.yaml"):
            assert re.search(rf"^  {path.stem} +\S", text, re.MULTILINE), path
    assert "  python -m cl_bench +strategy=gpm +stream=permuted_digits\n" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("columns", [80, 120])
def test_the_listing_fits_the_terminal(cli, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    status, out, _ = cli()
    assert status == 0
    assert max(map(len, out.splitlines())) <= columns
    if columns == 120:
        names = r"^  (\S+)  +\S"
        assert len(re.findall(names, out, re.MULTILINE)) > 15
        assert cli("--help")[1].startswith(out)


def test_the_listing_shows_configs_of_ones_own(cli, tmp_path):
    (tmp_path / "conf/strategy").mkdir(parents=True)
    (tmp_path / "conf/strategy/mine.yaml").write_text("# python ...\n# Mine own\n_target_: a.B\n")
    assert "  mine  " in cli("--config-dir", "conf")[1]
    assert "  mine  " in cli("hydra.searchpath=[file://conf]")[1]


# --- composing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [False, True])
def test_a_stream_brings_defaults_and_the_user_has_the_last_word(flip):
    def composed(*overrides):
        return compose(*(reversed(overrides) if flip else overrides))

    config = composed("+strategy=gpm", "+stream=split_images")
    assert config.model._target_ == "cl_bench.models.SmallCNN"
    config = composed("+strategy=gpm", "+stream=pmnist")
    assert (config.batch_size, config.trainer.max_epochs) == (10, 5)
    config = composed(
        "+stream=split_images",
        "model=mlp",
        "optimizer=adam",
        "trainer.max_epochs=3",
        "batch_size=7",
        "+strategy=ewc",
    )
    assert config.model._target_ == "cl_bench.models.MLP"
    assert config.optimizer._target_ == "torch.optim.Adam"
    assert (config.trainer.max_epochs, config.batch_size) == (3, 7)


@pytest.mark.parametrize(
    "groups",
    [*itertools.permutations(("+strategy=fot", "+stream=permuted_digits", "+federation=small"))],
)
def test_the_small_federation_is_the_same_in_any_order_of_arguments(groups):
    config = compose(*groups)
    assert (config.model.hidden, config.optimizer.lr) == ([400, 400], 0.1)
    chosen = compose(*groups, "model.hidden=[8]", "optimizer.lr=0.5")
    assert (chosen.model.hidden, chosen.optimizer.lr) == ([8], 0.5)


def test_the_published_pmnist_experiment():
    config = compose("+experiment=gpm_pmnist")
    assert OmegaConf.to_container(config.strategy.threshold) == [0.95, 0.99, 0.99]
    assert (config.strategy.samples, config.strategy.rank_rule) == (300, "official")
    assert config.model == {
        "_target_": "cl_bench.models.MLP",
        "hidden": [100, 100],
        "bias": False,
        "dropout": [],
    }
    optimizer = {k: v for k, v in config.optimizer.items() if not k.startswith("_")}
    assert optimizer.pop("at_task") == "reset"
    assert optimizer == {"lr": 0.01, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
    assert (config.batch_size, config.trainer.max_epochs, config.stream.num_tasks) == (10, 5, 10)
    assert not config.stream.identity_first
    published = config.reference
    assert (published.acc, published.acc_std, published.bwt) == (93.91, 0.16, -3)
    assert (published.seeds, "Table 1" in published.source) == (5, True)
    assert compose("+strategy=gpm", "+stream=pmnist").reference is None


def test_what_the_authors_codes_do_on_cifar100_is_said_where_their_numbers_are():
    assert compose("+experiment=gpm_cifar100_superclass").stream.official_quirks is True
    trgp = compose("+experiment=trgp_split_cifar100").strategy
    assert (trgp.official_quirks, trgp.protect.norm) == (True, "free")


def test_published_forgetting_is_compared_with_what_it_is():
    reference = compose("+experiment=fot_pmnist").reference  # right after a task minus the end
    assert (reference.bwt, reference.bwt_std, "forgetting" in reference) == (-1.75, 0.06, False)


@pytest.mark.parametrize("flip", [False, True])
def test_an_experiments_strategy_can_be_exchanged(flip):
    overrides = ["+experiment=gpm_pmnist", "strategy=ewc", "trainer.max_epochs=2"]
    config = compose(*(overrides[::-1] if flip else overrides))
    assert config.strategy == compose("+strategy=ewc", "+stream=pmnist").strategy
    assert config.trainer.max_epochs == 2
    assert compose("+experiment=gpm_pmnist", "strategy.threshold=0.9").strategy.threshold == 0.9


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run in a process of its own with W&B offline, and everything that it printed."""
    cwd = tmp_path_factory.mktemp("finished")
    arguments = (
        "--config-dir",
        "own configs",
        "+strategy=gpm",
        "+stream=permuted_digits",
        "stream.num_tasks=2",
        "trainer.max_epochs=2",
        "strategy.threshold={backbone.fc1: 0.97, backbone.fc2: 0.9, heads.0: 0.95}",
        "+also=[er,ewc]",
        "also.er.memory=50",
        "logger.tags=[a,'b c']",
        "seed=3",
        "run_dir=out",
    )
    (cwd / "own configs").mkdir()
    return cwd, finish(start(*arguments, cwd=cwd, COLUMNS="80"))


def test_a_clean_run_is_quiet_and_leaves_its_files(finished):
    cwd, (status, out, err) = finished
    assert status == 0
    assert err == ""
    lines = out.splitlines()
    assert lines[0] == "permuted_digits · gpm+er+ewc · seed 3: out"
    assert lines[1] == "guarded: 100 % of the 17,400 weights that tasks share"
    assert [line[:8] for line in lines[2:4]] == ["task 1/2", "task 2/2"]
    assert lines[-1] == "everything about this run is in out"
    assert max(map(len, lines[4:])) <= 80
    assert "…" not in out
    assert {p.name for p in (cwd / "out").iterdir()} >= {*FILES, "wandb"}
    assert {p.name for p in cwd.iterdir()} == {"out", "own configs"}

    names, R = read_matrix(cwd / "out")
    assert names == ["perm_0", "perm_1"]
    assert R.shape == (3, 2)
    assert np.isfinite(R).all()
    events = [json.loads(line) for line in (cwd / "out/results.jsonl").read_text().splitlines()]
    epochs = [(e["task"], e["epoch"]) for e in events if e["event"] == "epoch"]
    assert epochs == [(0, 1), (0, 2), (1, 1), (1, 2)]
    ended = summary(cwd / "out")
    assert (ended["status"], ended["strategy"], ended["seed"]) == ("completed", "gpm+er+ewc", 3)
    assert ended["acc"] == pytest.approx(R[2].mean())
    config = OmegaConf.load(cwd / "out/config.yaml")
    assert config.also.er.memory == 50
    assert config.strategy.threshold == {"backbone.fc1": 0.97, "backbone.fc2": 0.9, "heads.0": 0.95}
    assert json.loads((cwd / "out/environment.json").read_text())["directory"] == str(cwd)


def test_command_txt_runs_exactly_this_again(finished):
    cwd, _ = finished
    line = (cwd / "out/command.txt").read_text().strip()
    python, *command = shlex.split(line)
    assert (python, command[:4]) == ("python", ["-m", "cl_bench", "--config-dir", "own configs"])
    assert "\"logger.tags=[a,'b c']\"" in line
    command[command.index("run_dir=out")] = "run_dir=again"
    status, _, err = finish(start(*command[2:], "logger.mode=disabled", cwd=cwd))
    assert (status, err) == (0, "")
    for name in ("accuracy_matrix.csv", "layers.csv"):
        assert (cwd / "again" / name).read_bytes() == (cwd / "out" / name).read_bytes()
    first, second = (OmegaConf.load(cwd / run / "config.yaml") for run in ("out", "again"))
    assert {k: v for k, v in first.items() if k not in ("run_dir", "logger")} == {
        k: v for k, v in second.items() if k not in ("run_dir", "logger")
    }


def test_jobs_of_a_multirun_have_their_own_directories_and_commands(cli, tmp_path):
    status, _, err = cli(
        *PLAIN[1:], "+strategy=finetune,gpm", "-m", "seed=0,-1", "hydra.searchpath=[file:///tmp]"
    )
    assert status == 2
    *jobs, last = err.splitlines()
    assert [re.match(r"error: job (\d) \(.*seed=-1.*\) failed: seed=-1", j)[1] for j in jobs] == [
        "1",
        "3",
    ]
    assert last == "error: 2 of the jobs failed: 1, 3"
    (sweep,) = (tmp_path / "runs/sweeps").iterdir()
    for name in ("finetune", "gpm"):
        (run,) = (sweep / "permuted_digits" / name).iterdir()
        assert run.name.startswith("seed0-")
        assert {p.name for p in run.iterdir()} >= FILES
        command = (run / "command.txt").read_text()
        assert f"+strategy={name} " in command
        assert "seed=0" in command
        assert "hydra.searchpath=[file:///tmp]" in command
        assert "-m " not in command.replace("-m cl_bench", "")
        settings = OmegaConf.load(run / "config.yaml")
        assert (settings.trainer.max_epochs, settings.stream.num_tasks) == (1, 2)

    assert cli("-m", *PLAIN, "model.hidden=[5],[6]", "sweep_dir=widths")[0] == 0
    widths = {
        tuple(OmegaConf.load(p).model.hidden)
        for p in (tmp_path / "widths/permuted_digits/gpm").glob("seed0-*/config.yaml")
    }
    assert widths == {(5,), (6,)}


def test_a_multirun_in_one_directory_is_refused_unless_it_is_numbered(cli, tmp_path):
    status, _, err = cli("-m", *PLAIN, "run_dir=out", "seed=0,1")
    assert status == 2
    assert "'run_dir=out/${hydra:job.num}'" in err
    assert not (tmp_path / "out").exists()
    assert cli("-m", *PLAIN, "run_dir=out/${hydra:job.num}", "seed=0,1")[0] == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0", "1"]


def test_a_multirun_that_cannot_be_composed_starts_nothing(cli, tmp_path):
    status, out, err = cli("-m", *PLAIN[1:], "+strategy=gpm,gpmm")
    assert (status, out) == (2, "")
    assert "+strategy=gpmm: there is no such strategy. Did you mean +strategy=gpm?" in err
    assert not (tmp_path / "runs/permuted_digits").exists()


def test_of_two_runs_started_at_once_in_one_directory_one_wins(tmp_path):
    runs = [start(*PLAIN, "run_dir=out", f"seed={seed}", cwd=tmp_path) for seed in (0, 1)]
    ended = [finish(run) for run in runs]
    assert sorted(status for status, _, _ in ended) == [0, 2]
    winner = next(seed for seed, (status, _, _) in enumerate(ended) if status == 0)
    err = ended[1 - winner][2]
    assert re.match(r"error: run_dir=out (already holds a run|is being written by)", err)
    assert "Traceback" not in err
    assert (summary(tmp_path / "out")["status"], summary(tmp_path / "out")["seed"]) == (
        "completed",
        winner,
    )


# --- Ctrl-C and SIGTERM ---------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_in_order(tmp_path, number, status):
    process = start(*PLAIN, "trainer.max_epochs=100000", "run_dir=out", cwd=tmp_path)
    results = tmp_path / "out/results.jsonl"
    deadline = time.monotonic() + 60
    while not (results.exists() and '"epoch"' in results.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    ended, _, err = finish(process)
    assert ended == status
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith(f"interrupted ({number.name}): results so far are in out")
    assert summary(tmp_path / "out")["status"] == "interrupted"
    assert json.loads(results.read_text().splitlines()[-1])["status"] == "interrupted"
    assert not (tmp_path / "out/run.lock").exists()


def test_a_signal_during_the_start_waits_for_the_imports(tmp_path):
    code = (
        "import os, signal, sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'numpy.linalg':\n"
        "            sys.meta_path.remove(self)\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        f"sys.argv = ['cl_bench', *{[*PLAIN, 'run_dir=out']!r}]\n"
        "from cl_bench.cli import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "interrupted (SIGINT): nothing was recorded yet\n"
    assert list(tmp_path.iterdir()) == []
