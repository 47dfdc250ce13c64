"""Which optimizers keep a projected gradient in its subspace: the rule against what they do."""

import functools

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Muon, RMSprop
from toys import make_learner, make_stream

from cl_bench.optimizers import place_of, place_of_factory


class Renamed(SGD):
    """Might do anything in its step."""


def out_of_the_subspace(factory, steps=4):
    """How far, of all they move, an optimizer's steps on projected gradients lead out of it."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 8, dtype=torch.float64))
    M = torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64)).Q
    begun, optimizer = weight.detach().clone(), factory([{"params": [weight]}])
    for _ in range(steps):
        gradient = torch.randn(6, 8, dtype=torch.float64)
        weight.grad = gradient - gradient @ M @ M.T
        optimizer.step()
    change = weight.detach() - begun
    return float((change @ M).norm() / change.norm())


FACTORIES = {
    "sgd": (functools.partial(SGD, lr=0.1), "gradient"),
    "momentum": (functools.partial(SGD, lr=0.1, momentum=0.9), "gradient"),
    "nesterov": (functools.partial(SGD, lr=0.1, momentum=0.9, nesterov=True), "gradient"),
    "decay": (functools.partial(SGD, lr=0.1, weight_decay=0.1), "step"),
    "adam": (functools.partial(Adam, lr=0.1), "step"),
    "adamw": (functools.partial(AdamW, lr=0.1), "step"),
    "rmsprop": (functools.partial(RMSprop, lr=0.1), "step"),
    "muon": (functools.partial(Muon, lr=0.1), "step"),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_the_rule_is_what_the_steps_do(name):
    factory, expected = FACTORIES[name]
    weight = nn.Parameter(torch.randn(6, 8))
    assert place_of_factory(factory, [{"params": [weight]}], [weight]) == expected
    leaked = out_of_the_subspace(factory)
    assert leaked < 1e-12 if expected == "gradient" else leaked > 1e-3


def test_momentum_of_before_decay_of_these_and_company_count():
    ours, other = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
    fresh = SGD([{"params": [ours]}, {"params": [other], "weight_decay": 0.1}], lr=0.1, momentum=1)
    assert place_of([fresh], [ours]) == "gradient"
    assert place_of([fresh], [other]) == "step"
    assert place_of([fresh, SGD([other], lr=0.1)], [ours]) == "step"
    assert place_of([], [ours]) == "step"
    assert place_of([Renamed([ours], lr=0.1)], [ours]) == "step"
    ours.grad = torch.ones(3)
    fresh.step()
    assert place_of([fresh], [ours]) == "step"


def test_a_factory_that_refuses_what_it_is_tried_on_counts_as_step():
    matrices = functools.partial(Muon, lr=0.1)
    assert place_of_factory(matrices, [], []) == "step"
    with pytest.raises(ValueError, match="2D"):
        matrices([{"params": [nn.Parameter(torch.zeros(1))]}])
    assert make_learner(make_stream(), optimizer=matrices).projectable == "step"
