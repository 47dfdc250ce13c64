"""The command line as its users meet it: what it prints, leaves behind and returns."""

import itertools
import json
import os
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
from omegaconf import OmegaConf
from toys import make_stream

from cl_bench.cli import main
from cl_bench.cli.folders import conf_directory
from cl_bench.contracts import Needs, Strategy, Stream
from cl_bench.tracking import read_matrix

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "HYDRA_FULL_ERROR": "0",
}
SHORT = ("stream.num_tasks=2", "trainer.max_epochs=1", "logger.mode=disabled")
PLAIN = ("+strategy=gpm", "+stream=permuted_digits", *SHORT)
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


def start(*arguments, cwd, **environment):
    """``python -m cl_bench`` as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "cl_bench", *arguments],
        cwd=cwd,
        env={**ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err


def compose(*overrides):
    with hydra.initialize_config_dir(str(conf_directory()), version_base="1.3"):
        return hydra.compose("config", list(overrides))


def summary(directory):
    return json.loads((directory / "summary.json").read_text())


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
        for path in (ROOT / "conf" / group).glob("*.yaml"):
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


# --- bad input ------------------------------------------------------------------------------------

REFUSED = {
    "strategy.thresold=0.9": "there is no such setting. Did you mean strategy.threshold?",
    "+strategy.thresold=0.9": "GPM has no such argument. Did you mean strategy.threshold?",
    "epochs=3": "Did you mean trainer.max_epochs?",
    "strategy.threshold=1.7": "must lie in (0, 1]; by default 0.95",
    "strategy.threshold=0": "must lie in (0, 1]",
    "strategy.protect.bias=none": "use free, augmented or frozen",
    "batch_size=-1": "at least 1",
    "batch_size=many": "must be a whole number",
    "seed=-1": "must not be negative",
    "pack=0": "at least 1",
    "trainer.max_epochs=0": "at least 1",
    "trainer.max_epochs=few": "trainer.max_epochs=few: must be a whole number\n",
    "optimizer.lr=0,01": "optimizer.lr=[0,01] for a list, a point in a decimal number",
    "seed=٣": "write numbers with the digits 0 to 9",
    "trainer.devices=2": "train together with trainer=ddp or",
    "trainer.accelerator=abacus": "Available names are: auto",
    "trainer.gradient_clip_algorithm=value": "use trainer.gradient_clip_algorithm=norm",
    "+trainer.max_epoch=3": "Did you mean trainer.max_epochs?",
    "+trainer.epochs=3": "Did you mean trainer.max_epochs?\nIt takes: accelerator, strategy",
    "+alignment.on=true": "alignment.on=true: AlignmentSettings has no such argument",
    "=3": "names no setting; an override is key=value",
    "--seed=3": "there is no such flag; a setting has no dashes, seed=...",
    "+optimizer.nesterov=true": "change it without the plus, optimizer.nesterov=...",
    "schedule=[cosine,steps]": "choose one; -m schedule=cosine,steps runs all",
    "strategy.protect=[fc1]": "set them one by one, strategy.protect.<option>=...",
    "+optimizer.fused=true +optimizer.foreach=true": "cannot be `True` together",
    "+also=": "choose one of er, ewc, freeze",
    "hydra/launcher=nope": "no such launcher is installed",
    "+schedule.T_max=3": "has no effect, as no schedule is chosen; add schedule=...",
    "optimizer.lr=-0.5": "must not be negative; by default 0.001",
    "+optimizer.betas=[0.9,0.99]": "SGD has no such argument",
    "model=mpl": "there is no such model. Did you mean model=mlp?",
    "+model=mlp": "change it without the plus, model=...",
    "model=[mlp,cnn_small]": "choose one; -m model=mlp,cnn_small runs all",
    "model.hidden=[0]": "every entry: at least 1",
    "stream.num_tasks=0": "must lie in [1, 100]",
    "eval.tasks=some": "use seen or all",
    "eval.max_samples=0": "at least 1, or null",
    "+eval.every=2": "EvalSettings has no such argument",
    "alignment.threshold=2": "must lie in (0, 1]",
    "logger.mode=onlin": "use online, offline or disabled",
    "+logger.team=us": "no such argument",
    "also=er": "add it with a plus, +also=er",
    "+also=sgd": "there is no such companion.\nThere are: ",
    "+also=er +also=ewc": "use +also=[er,ewc]",
    "+also=er also.er.memory=0": "also.er.memory=0: at least 1",
    "strategy.threshold=[0.9": "with quotes around special characters",
    "seed=${nothing}": "nothing",
    "+trainer.logger=true": "cl_bench sets it itself",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_bad_input_is_one_error_that_names_value_and_remedy(cli, tmp_path, overrides):
    status, out, err = cli(*PLAIN, "run_dir=out", *overrides.split(" "))
    assert status == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("error") == 1
    assert REFUSED[overrides] in err
    value = overrides.split(" ")[-1].lstrip("+")
    if value not in ("seed=${nothing}", "trainer.logger=true"):
        assert value in re.sub(r"['\" ]", "", err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["+stream=permuted_digits"], "no strategy is named: add one, for example +strategy=gpm"),
        (
            ["+stratgy=gpm", "+stream=permuted_digits"],
            "+stratgy=gpm: there is no such setting. Did you mean +strategy=gpm?",
        ),
        (["+strategy=gpm"], "no stream is named: add one, for example +stream=permuted_digits"),
        (["+strategy=gpm", "stream.num_tasks=2"], "no stream is named; add one, +stream=..."),
        (
            ["strategy=gpm", "+stream=permuted_digits"],
            "strategy=gpm: strategy has no default to replace; add it with a plus, +strategy=gpm",
        ),
        (
            ["+strategy=gpmm", "+stream=permuted_digits"],
            "+strategy=gpmm: there is no such strategy. Did you mean +strategy=gpm?\nThere are: ",
        ),
        (["+strategy=gpm", "+stream=mnist"], "Did you mean +stream=pmnist?\nThere are: "),
        (["+experiment=gpm"], "+experiment=gpm: there is no such experiment."),
        (
            ["+strategy=[gpm,er]", "+stream=permuted_digits"],
            "+strategy=[gpm,er]: a run has one strategy; name it and add the others as companions: "
            "+strategy=gpm +also=er",
        ),
        (["+strategy=[gpm,er,ewc]", "+stream=permuted_digits"], "+strategy=gpm +also=[er,ewc]"),
        (
            ["+strategy=er", "+also=er", "+stream=permuted_digits"],
            "+also=er: the strategy is 'er' already",
        ),
        (
            ["+experiment=gpm_pmnist", "stream.data_dir=/nowhere"],
            "stream.data_dir=/nowhere: no such folder",
        ),
        (["--config-dir", "/nowhere", "+strategy=gpm"], "'/nowhere' not found"),
    ],
)
def test_a_wrong_choice_is_answered_with_the_choices(cli, tmp_path, arguments, message):
    status, out, err = cli(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_missing_data_is_an_error_at_once(tmp_path):
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    offline["CL_BENCH_CACHE"] = str(tmp_path / "cache")
    status, out, err = finish(start("+strategy=gpm", "+stream=pmnist", cwd=tmp_path, **offline))
    assert (status, out) == (2, "")
    assert err.startswith("error: stream.data_dir=null: ylecun/mnist cannot be loaded")
    assert "+stream=permuted_digits" in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_it(cli, tmp_path):
    status, _, err = cli(*PLAIN, "run_dir=out", "optimizer.lr=1e6")
    assert status == 2
    assert re.match(r"error: the loss became (nan|inf) in task 'perm_0' at step \d+; lower", err)
    assert err.splitlines()[-1] == "results so far are in out"
    assert summary(tmp_path / "out")["status"] == "failed"
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"accuracy_matrix.csv", "config.yaml"}


def test_a_directory_that_holds_a_run_or_cannot_be_written_is_refused(cli, tmp_path):
    (tmp_path / "file").touch()
    status, out, err = cli(*PLAIN, "run_dir=file/run")
    assert (status, out) == (2, "")
    assert "cannot write file/run" in err
    assert "give run_dir=... where you may write" in err
    assert cli(*PLAIN, "run_dir=out")[0] == 0
    before = {p: p.read_bytes() for p in (tmp_path / "out").glob("*.*")}
    status, out, err = cli(*PLAIN, "run_dir=out", "seed=1")
    assert (status, out) == (2, "")
    assert err.startswith("error: run_dir=out already holds a run: give another run_dir=...")
    assert {p: p.read_bytes() for p in (tmp_path / "out").glob("*.*")} == before


def test_a_multirun_where_nothing_can_be_written_is_refused(cli, tmp_path):
    (tmp_path / "runs").touch()
    status, _, err = cli("-m", *PLAIN, "seed=0,1")
    assert status == 2
    assert "runs/sweeps" in err
    assert len(err.splitlines()) == 1


def test_hydra_full_error_shows_the_traceback(cli, monkeypatch):
    status, _, err = cli(*PLAIN, "seed=-1")
    assert (status, "Traceback" in err) == (2, False)
    monkeypatch.setattr(sys, "argv", ["cl_bench", *PLAIN, "seed=-1"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="seed=-1"):
        main()


# --- strategies and streams of ones own -----------------------------------------------------------


class NeedsTaskId(Strategy):
    needs = Needs(task_id_at_test=True)


class Rewriting(Strategy):
    needs = Needs(rewrites_gradients=True)


def own_stream(fault: str = "", scenario: str = "task") -> Stream:
    stream = make_stream(scenario)
    last = stream[2].data.tensors
    if fault == "empty":
        last.update({k: v[:0] for k, v in last.items()})
    elif fault == "labels":
        last["y"] += 5
    return stream


@pytest.fixture
def own(cli, tmp_path):
    """The command line with strategies and a stream from this file, found by ``--config-dir``."""
    conf = tmp_path / "conf"
    for name, target in (
        ("strategy/needs_id", "NeedsTaskId"),
        ("strategy/rewriting", "Rewriting"),
        ("stream/toy", "own_stream"),
    ):
        path = conf / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"_target_: test_cli.{target}\n")
    (conf / "also").mkdir()
    text = "# @package also.rewriting\n_target_: test_cli.Rewriting\n"
    (conf / "also/rewriting.yaml").write_text(text)

    def run(*arguments):
        return cli("--config-dir", "conf", "logger.mode=disabled", "run_dir=out", *arguments)

    return run


def test_a_strategy_that_needs_the_task_id_is_refused_where_there_is_none(own, tmp_path):
    withheld = ("+stream=permuted_digits", "stream.task_id_at_test=false")
    status, out, err = own("+strategy=needs_id", *withheld)
    assert (status, out) == (2, "")
    assert "'needs_id' needs the task id at test time, stream 'permuted_digits'" in err
    assert "use a task-incremental stream" in err
    assert not (tmp_path / "out").exists()
    assert own("+strategy=needs_id", "+stream=toy", "trainer.max_epochs=1")[0] == 0


@pytest.mark.parametrize("needs_it", [True, False])
def test_a_permuted_stream_gives_the_task_id_to_strategies_that_need_it(own, tmp_path, needs_it):
    strategy = "needs_id" if needs_it else "rewriting"
    short = ("stream.num_tasks=2", "trainer.max_epochs=1")
    status, out, err = own(f"+strategy={strategy}", "+stream=permuted_digits", *short)
    assert status == 0, err
    assert ("needs_id is given the task id at test time" in out) == needs_it
    assert ("task id known at test time" in out) == needs_it
    assert summary(tmp_path / "out")["task_id_known"] is needs_it


def test_two_companions_that_rewrite_gradients_are_refused(own, tmp_path):
    status, out, err = own("+strategy=gpm", "+also=[er,rewriting]", "+stream=toy")
    assert (status, out) == (2, "")
    assert "gpm and rewriting both rewrite gradients" in err
    assert not (tmp_path / "out").exists()
    trained = own("+strategy=gpm", "+also=[er,freeze]", "+stream=toy", "trainer.max_epochs=1")
    assert trained[0] == 0, trained[2]
    assert summary(tmp_path / "out")["strategy"] == "gpm+er+freeze"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("empty", "task 't2' has no training samples"),
        ("labels", "task 't2' has labels 11..13, outside its head's classes 6..8"),
    ],
)
def test_a_stream_with_a_fault_in_its_last_task_is_refused_before_the_first(
    own, tmp_path, fault, message
):
    status, out, err = own("+strategy=finetune", "+stream=toy", f"+stream.fault={fault}")
    assert (status, out) == (2, "")
    assert message in err
    assert not (tmp_path / "out").exists()


def test_a_wrong_key_of_ones_own_strategy_is_answered_too(own):
    _, _, err = own("+strategy=gpm", "+stream=toy", "+stream.fautl=empty")
    assert "stream.fautl=empty: own_stream has no such argument. Did you mean stream.fault?" in err
    _, _, err = own("+strategy=gpm", "+stream=toy", "strategy.sampels=3")
    assert "Did you mean strategy.samples?" in err
    _, _, err = own("+strategy=need_id", "+stream=toy")
    assert "Did you mean +strategy=needs_id?" in err


def test_the_environment_stays_as_it_was(cli, monkeypatch):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    before = dict(os.environ)
    status, _, _ = cli("+strategy=gpm", "+stream=nothing")
    assert status != 0
    changed = {k for k in {*before, *os.environ} if before.get(k) != os.environ.get(k)}
    assert changed <= {"HYDRA_FULL_ERROR", "PYTEST_CURRENT_TEST"}
    assert os.environ["HYDRA_FULL_ERROR"] == "0"  # what the fixture set
