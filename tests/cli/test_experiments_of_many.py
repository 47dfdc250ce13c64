"""Experiments of several strategies, each with settings of its own beside theirs."""

import json

import pytest
from omegaconf import OmegaConf
from test_shared_groups import CONF, composed

from cl_bench.cli.settings import check_top_level
from cl_bench.contracts import UsageError

PUBLISHED = CONF.parent / "docs/results/published/split_mnist.json"


def part(path, **chosen):
    """What a file adds to its experiment, where ``chosen`` is the rest of the configuration."""
    return OmegaConf.merge(OmegaConf.create(chosen), OmegaConf.load(CONF / "experiment" / path))


@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_split_mnist_has_the_published_figures_and_strengths_of_every_scenario(scenario):
    """Of github.com/GT-RIPL/Continual-Learning-Benchmark, by scenario."""
    published = {row["id"]: row for row in json.loads(PUBLISHED.read_text())["values"]}
    found = {}
    for file in (CONF / "experiment/split_mnist").glob("*.yaml"):
        found[file.stem] = part(f"split_mnist/{file.name}", stream={"scenario": scenario})
    assert len(found) == 8
    for name, cfg in found.items():
        row = published[f"{name}_{scenario}"]
        assert {k: cfg.reference[k] for k in ("strategy", "acc", "acc_std")} == {
            k: row[k] for k in ("strategy", "acc", "acc_std")
        }
    coefficients = {  # their reg_coef, and by how much our penalty is less at the same strength
        "ewc": ({"task": 100, "domain": 100, "class": 600}, 2),
        "si": ({"task": 300, "domain": 3000, "class": 600}, 1),
        "l2": ({"task": 0.01, "domain": 0.5, "class": 100}, 2),
    }
    for name, (values, less) in coefficients.items():
        assert found[name].strategy.strength == pytest.approx(less * values[scenario])


def test_split_mnist_is_the_published_protocol():
    words = ["+experiment=split_mnist", "strategy=si", "stream.scenario=domain"]
    si, gem = composed(*words), composed("+experiment=split_mnist_gem")
    assert (si["strategy"]["strength"], si["reference"]["acc"]) == (3000.0, 64.76)
    assert (si["optimizer"]["_target_"], si["optimizer"]["lr"]) == ("torch.optim.Adam", 0.001)
    assert (gem["optimizer"]["_target_"], gem["optimizer"]["lr"]) == ("torch.optim.SGD", 0.01)
    assert (4 * gem["strategy"]["memory"], gem["strategy"]["margin"]) == (1100, 0.5)
    for found in (si, gem):
        assert (found["model"]["hidden"], found["model"]["bias"]) == ([400, 400], True)
        assert (found["batch_size"], found["trainer"]["max_epochs"]) == (128, 4)
        assert [found["stream"][k] for k in ("padding", "mean", "std")] == [2, 0.1, 0.2752]


@pytest.mark.parametrize("kept", [200, 500])
def test_rotated_mnist_keeps_as_many_samples_with_every_method(kept):
    rates = {}
    whole = json.loads((PUBLISHED.parent / "rotated_mnist.json").read_text())
    published = {row["id"]: row for row in whole["values"]}
    for file in (CONF / "experiment/rotated_mnist").glob("*.yaml"):
        keeps = "kept:" in file.read_text()
        found = part(f"rotated_mnist/{file.name}", seed=7)
        if keeps:
            found.kept = kept
            tasks = 20 if file.stem in ("gem", "agem") else 1
            assert found.strategy.memory * tasks == kept
        rates[file.stem] = found.optimizer.lr
        if file.stem != "finetune":
            row = published[f"{file.stem}_{kept}" if keeps else file.stem]
            told = OmegaConf.to_container(found.reference, resolve=True)
            assert {k: told[k] for k in ("strategy", "acc", "acc_std")} == {
                k: row[k] for k in ("strategy", "acc", "acc_std")
            }
    assert rates["derpp"] == {200: 0.1, 500: 0.2}[kept]
    assert all(isinstance(rate, float) for rate in rates.values())


def test_rotated_mnist_has_angles_and_settings_of_its_own():
    words = ["+experiment=rotated_mnist", "strategy=derpp", "kept=500", "seed=7"]
    found = composed(*words)
    assert (found["strategy"]["alpha"], found["strategy"]["beta"]) == (0.5, 1.0)
    assert (found["stream"]["angles"], found["stream"]["order_seed"]) == ("uniform", 7)
    assert (found["batch_size"], found["trainer"]["max_epochs"]) == (128, 1)


def test_all_classics_on_digits_keep_as_much_and_know_no_more_than_they_must():
    for file in (CONF / "experiment/classics_digits").glob("*.yaml"):
        found = part(f"classics_digits/{file.name}")
        if "strength" in found.get("strategy", {}):
            assert file.stem == "mas"
        elif "strategy" in found:
            assert found.strategy.memory == (40 if file.stem in ("gem", "agem") else 200)
        else:
            assert (file.stem in ("hat", "packnet"), found.stream.scenario) == (True, "task")
    assert composed("+experiment=classics_digits", "strategy=hat")["stream"]["scenario"] == "task"
    bic = composed("+experiment=classics_digits", "strategy=bic")
    assert (bic["stream"]["scenario"], bic["strategy"]["memory"]) == ("class", 200)


def test_published_numbers_may_refer_to_others_and_are_checked_as_what_they_come_to():
    cfg = part("split_mnist/mas.yaml", stream={"scenario": "domain"})
    check_top_level(cfg)
    cfg.scenarios.domain.acc = "high"
    with pytest.raises(UsageError, match=r"reference\.acc=high: must be a number"):
        check_top_level(cfg)
