"""Every yaml of conf/optimizer: whose parameters get which rule, and whether it resumes."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.optim import AdamW

from cl_bench.cli.folders import conf_directory
from cl_bench.cli.optimizers import build_optimizer
from cl_bench.contracts import UsageError
from cl_bench.experiment.snapshot import copied
from cl_bench.optimizers import ByRole, takes_roles, traits_of

FOLDER = conf_directory() / "optimizer"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
LIBRARY = [name for name in NAMES if "pytorch_optimizer." in (FOLDER / f"{name}.yaml").read_text()]
BY_ROLE = [name for name in NAMES if "by_role" in (FOLDER / f"{name}.yaml").read_text()]
MISSING = importlib.util.find_spec("pytorch_optimizer") is None


def needing(names):
    """Those that the package brings are skipped where it is not installed."""
    skip = pytest.mark.skipif(MISSING, reason="needs cl_bench[optimizers]: pytorch_optimizer")
    return [pytest.param(n, marks=skip) if n in LIBRARY else n for n in names]


def node(name, **changes):
    whole = OmegaConf.create({"optimizer": OmegaConf.load(FOLDER / f"{name}.yaml")})
    for key, value in changes.items():
        OmegaConf.update(whole, f"optimizer.{key}", value, force_add=True)
    return whole.optimizer


def parameters():
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(9, 6)), nn.Parameter(torch.randn(6))


def groups(factory, matrix, vector):
    if takes_roles(factory):
        return [{"params": [matrix], "role": "matrix"}, {"params": [vector], "role": "vector"}]
    return [{"params": [matrix, vector]}]


def step(optimizer, those, times, seed=0):
    for t in range(times):
        torch.manual_seed(seed + t)
        for parameter in those:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


@pytest.mark.parametrize("name", needing(NAMES))
def test_it_is_built_moves_all_and_resumes_as_its_traits_say(name):
    """A rule said to resume inside a task goes on bit for bit; of the others the state cannot."""
    built = build_optimizer(node(name))
    matrix, vector = parameters()
    begun = [p.detach().clone() for p in (matrix, vector)]
    optimizer = built.factory(groups(built.factory, matrix, vector))
    step(optimizer, (matrix, vector), 6)
    assert not any(torch.equal(p, b) for p, b in zip((matrix, vector), begun, strict=True))
    if not traits_of(built.tried).inside:
        with pytest.raises(UsageError, match="state_dict may return"):
            copied(optimizer.state_dict())
        return
    kept = copied(optimizer.state_dict())
    later, beside = (nn.Parameter(p.detach().clone()) for p in (matrix, vector))
    resumed = built.factory(groups(built.factory, later, beside))
    resumed.load_state_dict(kept)
    step(optimizer, (matrix, vector), 12, seed=100)
    step(resumed, (later, beside), 12, seed=100)
    assert torch.equal(matrix, later)
    assert torch.equal(vector, beside)


@pytest.mark.parametrize("name", needing(BY_ROLE))
def test_each_role_has_its_own_rule(name):
    """Three steps are the rule's own three on the matrix, and AdamW's on the vector."""
    cfg = node(name)
    factory = build_optimizer(cfg).factory
    matrix, vector = parameters()
    together = factory(groups(factory, matrix, vector))
    alone, beside = parameters()
    own = {"params": [alone], "lr": cfg.lr, **dict(cfg.get("group") or {})}
    rule = instantiate(cfg.rule, _convert_="all")([own])
    others = AdamW([beside], lr=cfg.others.lr, weight_decay=0.0)
    step(together, (matrix, vector), 3)
    for t in range(3):
        torch.manual_seed(t)
        alone.grad, beside.grad = torch.randn_like(alone), torch.randn_like(beside)
        rule.step()
        others.step()
    assert torch.equal(matrix, alone)
    assert torch.equal(vector, beside)


def test_a_schedule_and_a_rate_of_its_own_reach_both_rules():
    factory = build_optimizer(node("newton_schulz")).factory
    matrix, vector = parameters()
    made = factory(
        [
            {"params": [matrix], "role": "matrix", "lr": 0.04},
            {"params": [vector], "role": "vector", "lr": 0.04},
        ]
    )
    assert [group["lr"] for group in made.param_groups] == [0.04, 2e-3]  # twice the usual
    schedule = torch.optim.lr_scheduler.StepLR(made, 1, gamma=0.5)
    begun = matrix.detach().clone()
    matrix.grad, vector.grad = torch.ones_like(matrix), torch.ones_like(vector)
    made.step()
    schedule.step()
    assert [group["lr"] for group in made.inner[0].param_groups] == [0.02]
    assert not torch.equal(matrix, begun)


def test_groups_without_roles_are_no_groups_for_it():
    with pytest.raises(ValueError, match="role"):
        ByRole([{"params": [parameters()[0]]}], AdamW, AdamW, 0.1)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("sgd", {"at_task": "never"}, "must be one of reset, keep, keep_second_moments"),
        ("dion", {"rule.rank": 0}, "rank=0"),
        ("muon", {"rule.lr_fn": 1}, "optimizer.rule.lr_fn=1: Muon has no such argument"),
        ("muon", {"lr": -1}, "lr"),
        ("lookahead", {"alpha": 2}, "alpha=2"),
        ("muon", {"rule._target_": "torch.nn.Linear"}, "makes no optimizer"),
    ],
)
def test_what_makes_no_optimizer_is_refused_in_a_line(name, changes, message):
    with pytest.raises(UsageError, match=message) as refusal:
        build_optimizer(node(name, **changes))
    assert len(str(refusal.value).splitlines()) <= 2


@pytest.mark.skipif(MISSING, reason="needs cl_bench[optimizers]: pytorch_optimizer")
def test_an_option_that_the_library_would_pass_over_is_refused():
    with pytest.raises(UsageError, match="SOAP has no such argument"):
        build_optimizer(node("soap", **{"rule.frequency": 3}))


@pytest.mark.parametrize("name", LIBRARY)
def test_without_the_package_a_line_says_how_to_get_it(name, monkeypatch):
    found, gone = importlib.util.find_spec, "pytorch_optimizer"
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda n, *a: None if n == gone else found(n, *a),
    )
    with pytest.raises(UsageError) as refusal:
        build_optimizer(node(name))
    assert "pip install 'cl_bench[optimizers]'" in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


def test_importing_everything_loads_no_optional_package():
    code = (
        "import sys, cl_bench, cl_bench.cli, cl_bench.optimizers\n"
        "import cl_bench.strategies.surgery.surgery, cl_bench.strategies.surgery.bloop\n"
        "loaded = {'pytorch_optimizer', 'torchjd', 'peft', 'transformers'} & sys.modules.keys()\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=conf_directory().parent)
