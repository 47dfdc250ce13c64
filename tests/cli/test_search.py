"""Hyperparameters are chosen on validation data of the first tasks, and the record says so."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from cl_bench.cli.folders import conf_directory
from cl_bench.cli.listing import options
from cl_bench.cli.main import main
from cl_bench.cli.search import write_chosen
from cl_bench.experiment import SealedError, SearchSettings, for_search
from cl_bench.report.study import read_study

CONF = conf_directory()
SHORT = ("+stream=permuted_digits", "logger.mode=disabled", "trainer.max_epochs=1")


# --- test data is sealed --------------------------------------------------------------------------


def test_test_data_cannot_be_read_during_a_search():
    from cl_bench.tasks.permuted_digits import PermutedDigits

    stream = PermutedDigits(num_tasks=5)
    sealed = for_search(stream, SearchSettings(enabled=True, tasks=3))
    assert [t.name for t in sealed] == [t.name for t in stream[:3]]
    for task, whole in zip(sealed, stream, strict=False):
        with pytest.raises(SealedError, match="cannot be read during a search"):
            _ = task.test
        everything = torch.arange(len(whole.validation))
        for key, values in whole.validation[everything].items():
            assert torch.equal(task.scored[everything][key], values)
        assert torch.equal(task.sample(5, 0)["x"], whole.sample(5, 0)["x"])
        assert (task.index, task.head, task.classes) == (whole.index, whole.head, whole.classes)
        assert task.probes == {}
    with pytest.raises(SealedError):
        _ = sealed[:2][0].test
    assert for_search(stream, SearchSettings()) is stream


def test_a_strategy_that_looks_at_test_data_fails(cli, tmp_path, monkeypatch):
    (tmp_path / "conf/strategy").mkdir(parents=True)
    (tmp_path / "peeking.py").write_text(
        "from cl_bench.contracts import Strategy\n"
        "class Peeking(Strategy):\n"
        "    def setup(self, learner, task):\n"
        "        task.test\n"
    )
    (tmp_path / "conf/strategy/peeking.yaml").write_text("_target_: peeking.Peeking\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SealedError):
        cli("--config-dir", "conf", "+strategy=peeking", *SHORT, "search.enabled=true")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stream.validation_fraction=0"], "has no validation data to search on"),
        (["search.tasks=0"], "search.tasks=0: at least 1"),
    ],
)
def test_a_search_that_cannot_be_is_refused(cli, overrides, message):
    status, _, err = cli("+strategy=finetune", *SHORT, "search.enabled=true", *overrides)
    assert status == 2
    assert message in err


# --- the spaces -----------------------------------------------------------------------------------


def test_every_strategy_has_a_space_and_all_have_as_many_trials():
    spaces = options([CONF], "search")
    images = set(options([CONF], "strategy")) - {"lora"}
    assert set(spaces) <= images
    assert set(spaces) >= {"finetune", "joint", "gpm", "sgp", "rogo", "ewc", "er", "freeze"}
    base = OmegaConf.load(CONF / "search/_base.yaml")
    found = {name: OmegaConf.merge(base, OmegaConf.load(path)) for name, path in spaces.items()}
    assert {config.hydra.sweeper.n_trials for config in found.values()} == {20}
    assert {config.hydra.sweeper.sampler.seed for config in found.values()} == {0}
    for name, config in found.items():
        assert config.search.enabled
        assert "optimizer.lr" in config.hydra.sweeper.params, "each searches the rate too"
        strategy = OmegaConf.load(CONF / "strategy" / f"{name}.yaml")
        for key in config.hydra.sweeper.params:
            if key != "optimizer.lr":
                assert OmegaConf.select(strategy, key.removeprefix("strategy.")) is not None or (
                    key.removeprefix("strategy.") in strategy
                )


# --- from the search to the result ----------------------------------------------------------------


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    folder = tmp_path_factory.mktemp("searched")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HYDRA_FULL_ERROR", "0")
        arguments = ("-m", "+search=er", *SHORT, "hydra.sweeper.n_trials=3", "sweep_dir=search")
        patch.setattr(sys, "argv", ["cl_bench", *arguments])
        assert main() == 0
        results = {p: p.read_bytes() for p in Path("search").rglob("results.jsonl")}
        # The same command again asks for the same trials, and finds them done.
        patch.setenv("HYDRA_FULL_ERROR", "0")
        patch.setattr(sys, "argv", ["cl_bench", *arguments])
        assert main() == 0
        assert {p: p.read_bytes() for p in Path("search").rglob("results.jsonl")} == results
    return folder / "search"


def test_a_search_writes_down_trials_and_choice(searched):
    chosen = json.loads((searched / "chosen.json").read_text())
    assert (chosen["strategy"], chosen["stream"]) == ("er", "permuted_digits")
    assert (chosen["trials"], chosen["split"]) == (3, "validation")
    assert chosen["tasks"] == ["perm_0", "perm_1", "perm_2"]
    assert len(chosen["all"]) == 3
    best = max(chosen["all"], key=lambda trial: trial["acc"])
    assert best["values"] == chosen["values"]
    assert best["acc"] == chosen["acc"]
    for trial in chosen["all"]:
        summary = json.loads((searched / trial["run"] / "summary.json").read_text())
        assert summary["search"] == {"tasks": chosen["tasks"], "split": "validation"}
        assert summary["tasks"] == 3
    study = read_study([searched])
    assert (study.blocks, len(study.searches)) == ([], 3)


def test_what_was_superseded_is_no_trial(searched, tmp_path, capsys):
    sweep = Path(shutil.copytree(searched, tmp_path / "search"))
    before = json.loads((sweep / "chosen.json").read_text())
    trial = sweep / before["all"][0]["run"]
    aside = trial / "superseded" / "20261130-120000"
    aside.mkdir(parents=True)
    shutil.copy(trial / "summary.json", aside)
    assert write_chosen(sweep).startswith("chosen in 3 trials")
    assert json.loads((sweep / "chosen.json").read_text()) == before
    (trial / "summary.json").write_text("{")
    assert write_chosen(sweep)
    assert f"left out: {trial}/summary.json is damaged" in capsys.readouterr().err
    assert len(json.loads((sweep / "chosen.json").read_text())["all"]) == 2


def test_chosen_values_are_taken_and_the_record_says_where_from(cli, searched):
    # One of the searches below a directory: the one of this strategy on this stream.
    arguments = ("+strategy=er", *SHORT, "stream.num_tasks=4", f"selected={searched.parent}")
    status, _, err = cli(*arguments, "run_dir=out")
    assert status == 0, err
    chosen = json.loads((searched / "chosen.json").read_text())
    config = OmegaConf.load("out/config.yaml")
    for name, value in chosen["values"].items():
        assert OmegaConf.select(config, name) == value
    summary = json.loads(Path("out/summary.json").read_text())
    assert summary["selection"]["values"] == chosen["values"]
    assert summary["selection"]["all"] == chosen["all"]
    (row,) = read_study(["out"]).rows()
    assert row.selection["tasks"] == chosen["tasks"]

    status, _, err = cli(*arguments, "optimizer.lr=0.1")
    assert status == 2
    assert "optimizer.lr=... contradicts selected=" in err
    status, _, err = cli("+strategy=gpm", *SHORT, f"selected={searched}")
    assert status == 2
    assert "one finished search for gpm on permuted_digits is needed there, found none" in err
