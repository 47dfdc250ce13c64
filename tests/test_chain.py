"""Passes by hand: autograd's gradients to the bit, and only where nobody else watches them."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from toys import DIM, WIDTH, make_engine, make_learner, make_stream, mlp, weights

from cl_bench.experiment import Together
from cl_bench.learners import Classifier
from cl_bench.learners.chain import Chain
from cl_bench.models import MLP
from cl_bench.strategies.er import ER
from cl_bench.strategies.ewc import EWC
from cl_bench.strategies.finetune import Finetune
from cl_bench.strategies.freeze import Freeze
from cl_bench.strategies.gpm import GPM
from cl_bench.strategies.rogo import ROGO
from cl_bench.strategies.sgp import SGP
from cl_bench.subspace import ConfinedLinear, Projection, confinement

STRATEGIES = {
    "finetune": Finetune,
    "gpm": functools.partial(GPM, 0.8, samples=40),
    "rogo": functools.partial(ROGO, 0.9, cosine=0.3, samples=40, relax_samples=30),
    "sgp": functools.partial(SGP, 0.8, samples=40),
    "freeze": functools.partial(Freeze, n_blocks=1),
}


OPTIMIZERS = {
    "SGD": functools.partial(SGD, lr=0.05),
    "Adam": functools.partial(Adam, lr=0.01),
    "momentum and decay": functools.partial(SGD, lr=0.02, momentum=0.9, weight_decay=0.01),
}


def begun(model=None, scenario="domain", strategy=None, **options):
    stream = make_stream(scenario)
    learner = make_learner(stream, mlp() if model is None else model, pack=4, **options)
    learner.begin(stream[0], strategy or Finetune())
    return learner.train(), stream[0].everything


def confine(learner, names):
    """The layers called so learn outside a random subspace from here on."""
    for i, name in enumerate(names):
        layer = learner.get_submodule(name)
        rng = torch.Generator().manual_seed(i)
        d = layer.in_features
        M = torch.linalg.qr(torch.randn(d, d // 3, generator=rng).double())[0]
        ConfinedLinear.attach(layer, Projection(M), augmented=False)


def gradients(learner, batch, by_hand):
    chain = learner.chain() if by_hand else None
    assert (chain is not None) == by_hand
    for p in learner.parameters():
        p.grad = None
    out = chain(batch) if chain else learner(batch)
    learner.loss(out, batch).backward()
    if chain:
        chain.backward()
    return out.detach(), {name: p.grad for name, p in learner.named_parameters()}


@pytest.mark.parametrize("fetched", [False, True], ids=["a batch", "a slice of a fetched tensor"])
@pytest.mark.parametrize("confined", [(), ("backbone.fc1",), ("backbone.fc2", "heads.0")])
@pytest.mark.parametrize("frozen", [(), ("backbone.fc1.weight",), ("heads.0.weight",)])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_autograds_to_the_bit(bias, frozen, confined, fetched):
    learner, batch = begun(mlp(bias), head_bias=bias)
    confine(learner, confined)
    for name in frozen:
        learner.get_parameter(name).requires_grad_(False)
    if fetched:
        batch = {name: values.unflatten(0, (4, 10))[1] for name, values in batch.items()}
    expected_out, expected = gradients(learner, batch, by_hand=False)
    out, found = gradients(learner, batch, by_hand=True)
    assert torch.equal(out, expected_out)
    assert {n for n, g in expected.items() if g is None} == set(frozen)
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None
        else:
            assert gradient.abs().max() > 0
            assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_tasks_are_learned_the_same_to_the_bit(name, optimizer, monkeypatch):
    monkeypatch.setattr(confinement, "WORTHWHILE", float("-inf"))

    def learned():
        stream = make_stream(tasks=2, n=43)
        learner, strategy = make_learner(stream, mlp(), OPTIMIZERS[optimizer], pack=4), make()
        engine = make_engine(learner, strategy, epochs=3, pack=4)
        for t, task in enumerate(stream):
            engine.learn(task, strategy.train_data(stream, t))
        return weights(learner)

    make, passes, backward = STRATEGIES[name], [], Chain.backward
    monkeypatch.setattr(Chain, "backward", lambda it: passes.append(backward(it)))
    found = learned()
    assert len(passes) == 2 * 3 * 5  # tasks, epochs, steps
    monkeypatch.setattr(Classifier, "chain", lambda learner: None)
    expected = learned()
    for parameter, weight in expected.items():
        assert torch.equal(found[parameter], weight), parameter


class Twice(MLP):
    def forward(self, x):
        return 2 * super().forward(x)


class TwiceAsSure(Classifier):
    def forward(self, batch, head=None):
        return 2 * super().forward(batch, head)


def nothing(*_, **__):
    return None


def replaced(learner):
    layer = learner.backbone.fc1
    layer.forward = lambda x: 2 * nn.functional.linear(x, layer.weight)


WATCHED = {
    "a layer's hook": lambda it: it.backbone.fc1.register_forward_hook(nothing),
    "a head's hook before": lambda it: it.heads[0].register_forward_pre_hook(nothing),
    "the network's hook": lambda it: it.backbone.register_full_backward_hook(nothing),
    "the learner's hook": lambda it: it.register_forward_hook(nothing),
    "a weight's hook": lambda it: it.backbone.fc2.weight.register_hook(nothing),
    "a hook on what is summed": lambda it: (
        it.backbone.fc2.weight.register_post_accumulate_grad_hook(nothing)
    ),
    "another forward": replaced,
    "pruned": lambda it: nn.utils.prune.random_unstructured(it.backbone.fc2, "weight", 0.3),
    "parametrised": lambda it: nn.utils.parametrizations.orthogonal(it.backbone.fc2),
    "bias in the matrix": lambda it: ConfinedLinear.attach(
        it.backbone.fc1, Projection(torch.eye(DIM + 1).double()[:, :2]), augmented=True
    ),
}


@pytest.mark.parametrize("watched", WATCHED)
def test_where_somebody_is_to_see_the_pass_it_is_not_made_by_hand(watched):
    learner, _ = begun(mlp(bias=watched == "bias in the matrix"))
    assert learner.chain() is not None
    WATCHED[watched](learner)
    assert learner.chain() is None


def test_hooks_on_all_modules_see_the_pass():
    learner, _ = begun()
    handle = nn.modules.module.register_module_forward_hook(nothing)
    try:
        assert learner.chain() is None
    finally:
        handle.remove()
    assert learner.chain() is not None


def test_lower_precision_is_left_to_torch():
    learner, _ = begun()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert learner.chain() is None


@pytest.mark.parametrize(
    "model",
    [
        MLP((DIM,), (8, 8), dropout=(0.2, 0.2)),
        Twice((DIM,), (8, 8)),
        nn.Sequential(nn.Linear(DIM, 8), nn.Tanh()),
    ],
    ids=["dropout", "a forward of its own", "another activation"],
)
def test_other_networks_are_no_chains(model):
    assert begun(model)[0].chain() is None


def test_several_heads_and_other_learners_are_no_chains():
    assert begun(scenario="task")[0].chain() is None
    stream = make_stream()
    other = TwiceAsSure(stream, mlp(), functools.partial(SGD, lr=0.1), batch_size=10, seed=0)
    assert other.chain() is None


@pytest.mark.parametrize(
    "strategy",
    [EWC(5.0, samples=20), ER(20), Together({"er": ER(20), "gpm": GPM(0.8, samples=40)})],
    ids=["a penalty", "other batches", "a companion with other batches"],
)
def test_strategies_with_a_say_in_the_loss_see_autograds_pass(strategy):
    learner, _ = begun(strategy=strategy)
    assert learner.chain() is not None
    with learner._by_hand() as chain:
        assert chain is None


def test_a_loss_of_ones_own_is_left_to_autograd():
    class Doubled(Classifier):
        def loss(self, out, batch):
            return 2 * super().loss(out, batch)

    stream = make_stream()
    learner = Doubled(stream, mlp(), functools.partial(SGD, lr=0.1), batch_size=10, seed=0)
    assert learner.chain() is None


def test_one_layer_passed_twice_gets_the_sum_of_both():
    shared = nn.Linear(WIDTH, WIDTH, bias=False)
    model = mlp(hidden=(WIDTH, WIDTH, WIDTH))
    model.fc2 = model.fc3 = shared
    learner, batch = begun(model)
    _, expected = gradients(learner, batch, by_hand=False)
    _, found = gradients(learner, batch, by_hand=True)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_a_copy_made_between_two_steps_passes_its_own_layers():
    learner, batch = begun()
    with learner._by_hand() as chain:
        assert chain is not None
        copied = copy.deepcopy(learner)
    copied.objective(batch)[0].backward()
    assert copied.backbone.fc1.weight.grad.abs().max() > 0


def test_a_step_that_fails_leaves_no_chain_behind():
    learner, batch = begun()
    with pytest.raises(RuntimeError, match="stop"), learner._by_hand():
        raise RuntimeError("stop")
    learner.objective(batch)[0].backward()
    assert learner.backbone.fc1.weight.grad.abs().max() > 0


def test_anomalies_are_looked_for_by_torch():
    learner, _ = begun()
    with torch.autograd.detect_anomaly(check_nan=True):
        assert learner.chain() is None


def test_a_loss_that_does_not_ask_the_network_leaves_it_alone():
    learner, batch = begun()
    chain = learner.chain()
    chain(batch)
    (learner.heads[0].weight ** 2).sum().backward()
    expected = learner.heads[0].weight.grad.clone()
    chain.backward()
    assert torch.equal(learner.heads[0].weight.grad, expected)
    assert learner.backbone.fc1.weight.grad is None
