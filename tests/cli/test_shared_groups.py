"""Groups of ``conf`` that several configurations share, and settings that moved into them."""

import hydra
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from cl_bench.cli.folders import conf_directory
from cl_bench.cli.listing import options
from cl_bench.cli.sweep import _compared
from cl_bench.contracts import Protect
from cl_bench.tracking.reading import read_config

CONF = conf_directory()


def composed(*words):
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("config", [*words], return_hydra_config=True)
    sweeper = OmegaConf.to_container(cfg.hydra.sweeper)
    plain = {k: v for k, v in cfg.items() if k != "hydra"}
    return OmegaConf.to_container(OmegaConf.create(plain), resolve=True) | {"sweeper": sweeper}


@pytest.mark.parametrize("name", ["adam_nscl", "fot", "gpm", "rogo", "sgp", "trgp"])
def test_strategies_share_what_protect_says(name):
    node = composed(f"+strategy={name}", "+stream=permuted_digits")["strategy"]["protect"]
    assert instantiate(node) == Protect()
    word = "strategy.protect.bias=frozen"
    assert composed(f"+strategy={name}", "+stream=pmnist", word)["strategy"]["protect"] == {
        **node,
        "bias": "frozen",
    }


def test_a_preset_says_only_what_it_protects_otherwise():
    node = composed("+strategy=fot_official", "+stream=pmnist")["strategy"]["protect"]
    assert instantiate(node) == Protect(bias="free", norm="free")


@pytest.mark.parametrize(
    ("one", "other", "own"),
    [
        ("gpm_split_cifar100", "trgp_split_cifar100", set()),
        ("gpm_split_cifar100", "rogo_split_cifar100", set()),
        ("gpm_split_cifar100", "sgp_split_cifar100", {"optimizer", "schedule"}),
        ("gpm_five_datasets", "trgp_five_datasets", set()),
        ("gpm_split_mini_imagenet", "trgp_split_mini_imagenet", set()),
        ("gpm_pmnist", "er_pmnist", set()),
        ("gpm_pmnist", "ewc_pmnist", {"optimizer"}),
    ],
)
def test_experiments_of_a_protocol_differ_in_their_strategy(one, other, own):
    a, b = composed(f"+experiment={one}"), composed(f"+experiment={other}")
    assert {k for k in a if a[k] != b[k]} - {"reference"} == {"strategy", *own}


@pytest.mark.parametrize("name", sorted(options([CONF], "protocol")))
def test_a_protocol_serves_any_strategy_and_says_what_it_says(name):
    found = composed("+strategy=finetune", f"+protocol={name}")
    several = name in options([CONF], "experiment")  # one experiment of several strategies
    words = [f"+experiment={name}", "strategy=gpm"] if several else [f"+experiment=gpm_{name}"]
    whole = composed(*words)
    beside = {"strategy", "reference"}
    assert {k for k in found if found[k] != whole[k]} <= beside
    other = composed("+strategy=finetune", f"+protocol={name}", "stream=split_digits")
    assert other["batch_size"] == found["batch_size"], "the protocol's, not the stream's"
    assert other["trainer"] == found["trainer"]


@pytest.mark.parametrize("name", sorted(options([CONF], "search")))
def test_a_search_inherits_all_but_its_strategy_and_ranges(name):
    found, base = composed(f"+search={name}", "+stream=permuted_digits"), composed("+search=joint")
    params = found["sweeper"].pop("params")
    base["sweeper"].pop("params")
    assert found["sweeper"] == base["sweeper"]
    assert found["search"] == base["search"]
    assert found["search"]["enabled"]
    assert next(iter(params)) == "optimizer.lr", "draws come in this order"


def test_what_is_part_of_others_is_not_offered(cli):
    assert "_base" not in options([CONF], "search")
    assert "  _base  " not in cli()[1]
    status, _, err = cli("+search=bse", "+stream=permuted_digits")
    assert status == 2
    assert "There are: adam_nscl, " in err


def test_widths_have_another_name_now(cli):
    status, _, err = cli("+strategy=gpm", "+stream=permuted_digits", "widths=[8]")
    assert status == 2
    assert "widths=[8]: this setting is now model.hidden; write model.hidden=..." in err


@pytest.mark.parametrize(
    ("words", "hidden"),
    [
        ((), [100, 100]),
        (("+federation=small",), [400, 400]),
        (("+federation=small", "widths=[7]"), [7]),
        (("+federation=small", "model.hidden=[5]"), [5]),
    ],
)
def test_a_federation_has_wider_layers(words, hidden):
    assert composed("+strategy=fot", "+stream=permuted_digits", *words)["model"]["hidden"] == hidden


@pytest.mark.parametrize("words", [(), ("+federation=small",)])
def test_a_record_of_before_is_the_job_of_now(tmp_path, words):
    now = composed("+strategy=fot", "+stream=permuted_digits", *words)
    before = {"widths": [100, 100], **now}
    OmegaConf.save(before, tmp_path / "config.yaml")
    assert _compared(read_config(tmp_path)) == _compared(now)
    before["model"] = {**now["model"], "hidden": [3]}
    OmegaConf.save(before, tmp_path / "config.yaml")
    assert _compared(read_config(tmp_path)) != _compared(now)
