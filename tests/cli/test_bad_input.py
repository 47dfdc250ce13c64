"""Bad input, and faults of somebody's own strategy or stream: one error with value and remedy."""

import os
import re
import sys

import pytest
from commands import PLAIN, finish, start, summary
from toys import make_stream

from cl_bench.cli import main
from cl_bench.contracts import Needs, Strategy, Stream

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
        (
            ["+strategy=gpm", "+stream=permuted_digits", "~trainer.max_epochs"],
            "trainer.max_epochs is missing: a run needs it; leave ~trainer.max_epochs out\n",
        ),
        (
            ["+strategy=gpm", "+stream=permuted_digits", "logger=[csv,paper]"],
            "logger=paper: there is no such logger.\nThere are: ",
        ),
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
        path.write_text(f"_target_: {__name__}.{target}\n")
    (conf / "also").mkdir()
    text = f"# @package also.rewriting\n_target_: {__name__}.Rewriting\n"
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
