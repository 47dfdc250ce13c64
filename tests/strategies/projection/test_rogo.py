"""ROGO: relaxed spaces, their search, and its limits."""

import copy
import functools

import pytest
import torch
from family import (
    NETWORKS,
    OPTIMIZERS,
    assert_orthonormal,
    matrices,
    moments_of,
    relaxed,
    same_weights,
    setting,
    sgd,
    threshold,
)
from torch import nn
from toys import accuracy, learn, make_engine, make_learner, weights

from cl_bench.contracts import Plan, Progress, UsageError
from cl_bench.strategies.projection.gpm import GPM, layer_gradients
from cl_bench.strategies.projection.rogo import ROGO
from cl_bench.subspace import grow, leading_directions

# -- ROGO ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_changes_inside_the_memory_are_those_of_the_relaxed_space(network, optimizer):
    stream, learner, rogo, engine = relaxed(network, OPTIMIZERS[optimizer])
    found = 0
    for task in stream.tasks[1:]:
        before, memory = matrices(learner), dict(rogo.memory)
        naive = accuracy(learner, task)
        layers = engine.learn(task, Plan(task.train))
        after = matrices(learner)
        for name, M in memory.items():
            change = after[name] - before[name]
            B = rogo.bases.get(name, M[:, :0])
            assert layers[name]["relaxed"] == B.shape[1]
            found += B.shape[1]
            scale = float(change.norm())
            assert scale > 1e-4, name
            if not B.shape[1]:
                continue
            torch.testing.assert_close(rogo.images[name], before[name] @ B, atol=1e-4, rtol=1e-3)
            both = torch.cat([B, rogo.left[name]], 1)
            assert_orthonormal(both)
            torch.testing.assert_close(both @ both.t(), M @ M.t(), atol=1e-5, rtol=0)
            # W itself never moved inside M: what did is W B (S - I) B^T, W B of the task's start.
            turned = before[name] @ B @ rogo.changes[name] @ B.t()
            torch.testing.assert_close(change @ M, turned @ M, atol=2e-4, rtol=1e-3)
            assert float((change @ rogo.left[name]).norm()) < 2e-4 * scale
        assert accuracy(learner, task) > naive + 0.15
    assert found > 0
    assert max(float(c.norm()) for c in rogo.changes.values()) > 1e-3
    kinds = (nn.Linear, nn.Conv2d, nn.ReLU, nn.Flatten)
    assert all(type(m) in kinds for m in learner.backbone.modules() if m is not learner.backbone)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_weights_that_gradients_carry_and_weights_that_follow_go_the_same_way(momentum):
    ends = {}
    for carried in (True, False):
        optimizer = functools.partial(torch.optim.SGD, lr=0.05, momentum=momentum)
        stream, learner, rogo, engine = relaxed(optimizer=optimizer)
        new = rogo._nothing_relaxed

        def kept(learner, new=new, carried=carried):
            spaces = new(learner)
            assert spaces.carried
            assert spaces.frozen
            spaces.carried = carried
            return spaces

        rogo._nothing_relaxed = kept
        engine.learn(stream[1], Plan(stream[1].train))
        assert max(float(c.norm()) for c in rogo.changes.values()) > 1e-2
        ends[carried] = (weights(learner), rogo.changes)
    for mine, theirs in zip(ends[True], ends[False], strict=True):
        assert list(mine) == list(theirs)
        for name, value in mine.items():
            torch.testing.assert_close(value, theirs[name], atol=1e-4, rtol=1e-3)


def test_every_relaxed_direction_lies_close_to_the_gradient():
    stream, learner, rogo, _ = relaxed(cosine=0.5)
    learner.begin(stream[1], rogo)
    batch = stream[1].sample(40, 0)
    gradients = layer_gradients(learner, rogo.layers, batch)
    memory = dict(rogo.memory)
    assert rogo.relax(learner, stream[1], 1) > 0
    for name, space in rogo.relaxed.spaces.items():
        U = leading_directions(gradients[name], rogo.gradient_threshold)
        B = space.basis.double()
        assert bool(((U.t() @ B).norm(dim=0) >= 0.5 - 1e-4).all())
        torch.testing.assert_close(memory[name] @ memory[name].t() @ B, B, atol=1e-5, rtol=0)
    rogo.release(learner)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("pack", [1, 4])
def test_without_relaxation_it_is_gpm_bit_for_bit(network, pack):
    learned = []
    for strategy in (
        GPM(threshold(network), samples=40),
        ROGO(threshold=threshold(network), samples=40, cosine=1.0, gradient_threshold=1e-6),
    ):
        stream, _ = setting(network)
        learner = make_learner(stream, NETWORKS[network][0](), sgd, pack=pack)
        engine = make_engine(learner, strategy, epochs=2, pack=pack)
        for task in stream:
            layers = engine.learn(task, Plan(task.train))
        learned.append(learner)
    assert all(row["relaxed"] == 0 for row in layers.values())
    assert same_weights(*learned)


def test_a_strong_penalty_gives_gpm():
    learned = {}
    for name, strategy in {
        "gpm": GPM(0.97, samples=40),
        "strong": ROGO(threshold=0.97, samples=40, cosine=0.5, strength=9.0, rate_factor=1.0),
        "free": ROGO(threshold=0.97, samples=40, cosine=0.5, strength=0.0, rate_factor=1.0),
    }.items():
        stream, learner = setting()
        engine = make_engine(learner, strategy, epochs=4)
        for task in stream[:2]:
            layers = engine.learn(task, Plan(task.train))
        learned[name] = matrices(learner)
        if name != "gpm":
            assert sum(row["relaxed"] for row in layers.values()) > 0
    gaps = {
        name: max(
            float((learned[name][n] - w).norm() / w.norm()) for n, w in learned["gpm"].items()
        )
        for name in ("strong", "free")
    }
    assert gaps["strong"] < 0.2 * gaps["free"]


def test_each_success_scales_the_rate_and_the_search_ends_with_the_first_failure():
    stream, learner, rogo, _ = relaxed(rate_factor=0.5)
    learner.begin(stream[1], rogo)
    progress = functools.partial(Progress, max_epochs=9, train_loss=1.0, learning_rate=0.05)
    decisions = []
    for epoch in range(1, 9):
        decisions.append(rogo.after_epoch(learner, stream[1], progress(epoch)))
        if decisions[-1] is not None:
            assert decisions[-1].scale_rate == 0.5
            assert decisions[-1].rebuild_optimizer
    assert decisions[0] is not None
    first = decisions.index(None)
    assert all(d is None for d in decisions[first:])
    assert rogo.after_epoch(learner, stream[1], progress(9)) is None
    rogo.release(learner)


def test_relaxing_on_a_plateau():
    stream, learner, rogo, _ = relaxed(schedule="plateau", rounds=1, relax_below=1e-3)
    learner.begin(stream[1], rogo)
    at = functools.partial(Progress, epoch=1, max_epochs=9, train_loss=1.0)
    assert rogo.after_epoch(learner, stream[1], at(learning_rate=0.01, plateau=True)) is None
    assert rogo.after_epoch(learner, stream[1], at(learning_rate=1e-3, plateau=False)) is None
    decision = rogo.after_epoch(learner, stream[1], at(learning_rate=1e-3, plateau=True))
    assert decision.reset_rate
    assert decision.rebuild_optimizer
    assert rogo.after_epoch(learner, stream[1], at(learning_rate=1e-3, plateau=True)) is None
    rogo.release(learner)
    learner.begin(stream[1], rogo)
    with pytest.raises(UsageError, match=r"strategy\.schedule=epoch"):
        rogo.after_epoch(learner, stream[1], at(learning_rate=1e-3))
    rogo.release(learner)


def test_representations_from_gradients_span_less():
    stream, learner = setting("cnn")
    rogo = ROGO(threshold=0.9, samples=40, representation="gradients")
    learn(learner, rogo, stream[0], epochs=3)
    for layer in learner.layers(rogo.protect):
        assert 0 < rogo.memory[layer.name].shape[1] <= layer.out_features
        G = layer_gradients(learner, [layer], stream[0].sample(40, learner.seed))[layer.name]
        M = grow(None, moments_of(G), 0.9, below=True)[0]
        mine = rogo.memory[layer.name]
        torch.testing.assert_close(mine @ mine.t(), M @ M.t(), atol=1e-4, rtol=0)


# -- state, and going on in the middle of a task ---------------------------------------------------


def turn(rogo, std):
    for parameter in rogo.relaxed.parameters():
        parameter.data.normal_(std=std)
    for space in rogo.relaxed.spaces.values():
        space.follow()


def test_a_best_epoch_takes_the_relaxed_space_back_with_it():
    stream, learner, rogo, _ = relaxed()
    learner.begin(stream[1], rogo)
    rogo.relax(learner, stream[1], 1)
    turn(rogo, 0.1)
    kept = copy.deepcopy((learner.state_dict(), rogo.state_dict()))
    x = stream[1].everything
    learner.eval()
    expected = learner(x).detach()
    rogo.cosine = 0.1
    rogo.relax(learner, stream[1], 2)
    turn(rogo, 1.0)
    assert not torch.allclose(learner(x), expected)
    learner.load_state_dict(kept[0])
    rogo.load_state_dict(kept[1])
    assert torch.equal(learner(x), expected)
    for space in rogo.relaxed.spaces.values():
        space.follow()  # the weights are where S is
    assert torch.equal(learner(x), expected)
    rogo.release(learner)
