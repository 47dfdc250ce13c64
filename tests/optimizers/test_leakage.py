"""Which rules keep a protected subspace by themselves; a projected step keeps it for all."""

import sys
from pathlib import Path

import pytest
import torch
from toys import make_learner, make_stream

from cl_bench.contracts import UsageError
from cl_bench.strategies.projection.gpm import GPM

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from leakage import KEEP, SHAPES, STRATEGIES, factory_of, leak, leak_under, rules

RULES = rules()
LEAVE = ("AdamW", "Muon (bfloat16)", "largest entry", "column", "AdaMuon, sign", "DCT-Adam")


@pytest.mark.parametrize("name", RULES)
def test_a_projected_step_keeps_the_space_under_any_rule(name):
    assert leak(RULES[name], dtype=torch.float64, step=True, steps=15) < 1e-9
    for shape in SHAPES:
        assert leak(RULES[name], shape, step=True, steps=15) < 2e-5


@pytest.mark.parametrize("name", [name for name in RULES if name in KEEP])
def test_rules_that_keep_the_space_by_themselves(name):
    assert leak(RULES[name], dtype=torch.float64, steps=15) < 1e-9
    for shape in SHAPES:
        assert leak(RULES[name], shape, steps=15) < 1e-4


@pytest.mark.parametrize("name", LEAVE)
def test_rules_that_leave_it_need_the_projected_step(name):
    assert leak(RULES[name], steps=15) > 1e-3


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("optimizer", ["adamw", "newton_schulz"])
def test_no_strategy_lets_an_optimizer_in(name, optimizer):
    assert leak_under(STRATEGIES[name](), factory_of(optimizer)) < 2e-5
    exact = leak_under(STRATEGIES[name](), factory_of(optimizer), dtype=torch.float64)
    assert exact < 1e-9


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "adaptive_svd"])
def test_gradients_alone_would(name):
    assert leak_under(STRATEGIES[name](), factory_of("adamw"), gradients=True) > 1e-2


def test_a_pair_that_leaks_is_refused():
    learner = make_learner(make_stream(), optimizer=factory_of("adamw"))
    with pytest.raises(UsageError, match=r"use strategy\.project=step or auto"):
        GPM(project="gradient").setup(learner, make_stream()[0])
    GPM(project="gradient").setup(make_learner(make_stream()), make_stream()[0])
