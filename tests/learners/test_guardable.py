"""Where gradients may be projected, and biases that their owner froze."""

import functools

import pytest
import torch
from torch import nn
from torch.optim import SGD
from toys import IMAGE, cnn, learn, make_learner, make_stream, mlp, weights

from cl_bench.contracts import Protect
from cl_bench.experiment import Together
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.projection.gpm import GPM

# -- what is frozen stays frozen -------------------------------------------------------------------


def with_bias(stream, **options):
    return make_learner(stream, mlp(bias=True), head_bias=True, **options)


# -- where to project ------------------------------------------------------------------------------


class Grouped(GPM):
    """GPM with options of its own for some parameters, as a user's strategy may have."""

    def __init__(self, options, where):
        super().__init__(0.9, samples=40)
        self.options, self.where = options, where
        self.extra = nn.Parameter(torch.zeros(1))

    def param_groups(self, learner):
        named = learner.named_trainable()
        first = [p for n, p in named.items() if ("fc1" in n) == (self.where == "first")]
        rest = [p for n, p in named.items() if ("fc1" in n) != (self.where == "first")]
        if self.where == "own":
            return [{"params": first + rest}, {"params": [self.extra], **self.options}]
        return [{"params": first, **self.options}, {"params": rest}]


@pytest.mark.parametrize(
    ("options", "where", "expected"),
    [
        ({"weight_decay": 0.1}, "first", "step"),
        ({"weight_decay": 0.0}, "first", "input"),
        ({"momentum": 0.9, "lr": 0.5}, "first", "input"),
        ({"weight_decay": 0.1}, "own", "input"),
    ],
)
def test_projectable_looks_at_the_groups_options(options, where, expected):
    stream = make_stream()
    learner = make_learner(stream)
    strategy = Grouped(options, where)
    learner.begin(stream[0], strategy)
    assert learner.projectable == expected
    # The other way round: the optimizer decays, and no group of the network's weights does.
    decaying = make_learner(stream, optimizer=functools.partial(SGD, lr=0.1, weight_decay=0.1))
    assert decaying.projectable == "step"
    free = Grouped({"weight_decay": 0.0}, "all")
    free.param_groups = lambda learner: [
        {"params": learner.trainable_parameters(), "weight_decay": 0.0}
    ]
    decaying.begin(stream[0], free)
    assert decaying.projectable == "input"


def test_a_group_with_weight_decay_leaves_the_memory_alone():
    stream = make_stream()
    learner = make_learner(stream)
    strategy = Grouped({"weight_decay": 0.1}, "first")
    learn(learner, strategy, stream[0])
    before, M = weights(learner)["backbone.fc1.weight"], strategy.memory["backbone.fc1"]
    learn(learner, strategy, stream[1])
    change = weights(learner)["backbone.fc1.weight"] - before
    assert change.norm() > 1e-2
    assert (change @ M.to(change)).norm() < 1e-5 * change.norm()


# -- a bias that its owner froze -------------------------------------------------------------------


@pytest.mark.parametrize("project", ["gradient", "step"])
@pytest.mark.parametrize("make", [mlp, cnn])
def test_gpm_protects_the_outputs_of_layers_with_a_frozen_bias(make, project):
    options = {"shape": IMAGE} if make is cnn else {}
    stream = make_stream(**options)
    model = make(bias=True)
    found = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    frozen = found[: len(found) // 2]
    for module in frozen:
        nn.init.normal_(module.bias)
        module.bias.requires_grad_(False)
    learner = make_learner(stream, model)
    gpm = GPM(0.9, samples=40, rank_rule="energy", project=project)
    maps = {layer.name: layer for layer in learner.layers(Protect())}
    assert not any(layer.augmented for layer in maps.values() if layer.module in frozen)
    assert any(layer.augmented for layer in maps.values())
    learn(learner, gpm, stream[0])
    before, memory = weights(learner), dict(gpm.memory)
    learn(learner, gpm, stream[1])
    after = weights(learner)
    moved = 0
    for name, layer in maps.items():
        if layer.module not in frozen:
            continue
        path = name.split("#")[0]
        assert torch.equal(after[f"{path}.bias"], before[f"{path}.bias"])
        change = layer.matrix(after[f"{path}.weight"] - before[f"{path}.weight"], None)
        M = memory[name].to(change)
        assert (change @ M).norm() < 1e-4 * max(change.norm(), 1e-3)
        moved += change.norm() > 1e-3
    assert moved


class FreezesABias(Finetune):
    def setup(self, learner, task):
        if task.index:
            learner.backbone.fc2.bias.requires_grad_(False)


def test_a_bias_frozen_behind_gpms_back_is_refused():
    stream = make_stream()
    learner = with_bias(stream)
    both = Together({"gpm": GPM(0.9, samples=40), "other": FreezesABias()})
    learn(learner, both, stream[0])
    with pytest.raises(ValueError, match=r"bias of layer 'backbone.fc2' was frozen.*protect.bias"):
        learn(learner, both, stream[1])


def test_memories_of_another_width_are_refused():
    stream = make_stream()
    learner = with_bias(stream)
    gpm = GPM(0.9, samples=40)
    learn(learner, gpm, stream[0])
    learner.backbone.fc1.bias.requires_grad_(False)
    learner.remember_initial_state()
    with pytest.raises(ValueError, match=r"'backbone.fc1' remembers inputs of 13 .* has 12 now"):
        learner.begin(stream[1], gpm)
