"""Packed training learns what plain training learns, step by step."""

import functools

import pytest
import torch
from noise import noisy
from torch import nn
from torch.optim import SGD, Adam
from toys import learn, make_engine, make_learner, make_stream, mlp, weights

from cl_bench.contracts import Plan
from cl_bench.packed import stepping
from cl_bench.packed.stepping import short_step
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.penalty.ewc import EWC
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.strategies.replay.er import ER
from cl_bench.subspace import confinement

STRATEGIES = {
    "finetune": Finetune,
    "gpm": functools.partial(GPM, 0.8, samples=40),
    "ewc": functools.partial(EWC, 5.0, samples=20),
    "er": functools.partial(ER, 20),
}
OPTIMIZERS = {
    "SGD": functools.partial(SGD, lr=0.05),
    "Adam": functools.partial(Adam, lr=0.01),
    "momentum and decay": functools.partial(SGD, lr=0.02, momentum=0.9, weight_decay=0.01),
}


def trained(strategy, optimizer, pack, n=43, model=None, epochs=2):
    stream = make_stream(tasks=2, n=n)  # 4 batches of 10 and one of 3
    learner = make_learner(stream, model or mlp(), optimizer, pack=pack)
    engine = make_engine(learner, strategy, epochs=epochs, pack=pack)
    for t, task in enumerate(stream):
        engine.learn(task, strategy.plan(stream, t))
    return weights(learner), learner.learned_steps


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_packs_learn_the_same(name, optimizer, monkeypatch):
    monkeypatch.setattr(confinement, "WORTHWHILE", float("-inf"))
    make, rule = STRATEGIES[name], OPTIMIZERS[optimizer]
    expected, steps = trained(make(), rule, pack=1)
    found, packed_steps = trained(make(), rule, pack=64)
    assert steps == packed_steps == 2 * 5  # in the last task
    for n, weight in expected.items():
        torch.testing.assert_close(found[n], weight, atol=2e-5, rtol=1e-4)


@pytest.fixture
def rule():
    optimizer = SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1, momentum=0.9)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    return optimizer


def test_a_short_step_is_a_step_and_its_hooks_hear_of_it(rule):
    heard = []
    rule.register_step_post_hook(lambda optimizer, args, kwargs: heard.append(optimizer))
    step = short_step(rule)
    assert step != rule.step
    for _ in range(2):
        step()
    expected = 1 - 0.1 * (1 + 1.9)
    torch.testing.assert_close(
        rule.param_groups[0]["params"][0].detach(), torch.full((3,), expected)
    )
    assert heard == [rule, rule]


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({"foreach": False}, True),
        ({}, False),  # torch may take all weights at once
        *(
            ({"foreach": False, **other}, False)
            for other in ({"weight_decay": 0.1}, {"momentum": 0.9}, {"maximize": True})
        ),
    ],
    ids=str,
)
def test_a_short_step_of_sgd_has_torchs_bits(options, plain):
    def steps(short):
        rng = torch.Generator().manual_seed(0)
        w = nn.Parameter(torch.randn(7, 5, generator=rng))
        idle = nn.Parameter(torch.ones(2))  # has no gradient
        optimizer = SGD([{"params": [w], "lr": 0.3}, {"params": [idle]}], lr=0.1, **options)
        assert stepping._is_plain(optimizer) == plain
        step = short_step(optimizer) if short else optimizer.step
        for _ in range(3):
            w.grad = torch.randn(7, 5, generator=rng)
            step()
        assert torch.equal(idle, torch.ones(2))
        return w.detach(), optimizer.state_dict()

    (ours, our_state), (torchs, torchs_state) = steps(True), steps(False)
    assert torch.equal(ours, torchs)
    assert our_state["state"].keys() == torchs_state["state"].keys()


def test_a_short_backward_pass_has_torchs_gradients_and_torchs_complaints():
    rng = torch.Generator().manual_seed(0)
    w = nn.Parameter(torch.randn(5, 3, generator=rng))
    idle = nn.Parameter(torch.ones(2))

    def passes(backward):
        w.grad = None
        for scale in (1.0, 0.5):  # the second adds up
            backward((w.tanh() * scale).square().mean(), torch.tensor(0.7))
        assert idle.grad is None
        return w.grad

    assert torch.equal(passes(stepping.short_backward), passes(lambda loss, g: loss.backward(g)))
    with pytest.raises(RuntimeError, match="does not require grad"):
        stepping.short_backward(torch.ones(()), torch.ones(()))
    loss = w.tanh().sum()
    stepping.short_backward(loss, torch.ones(()))
    with pytest.raises(RuntimeError, match="second time"):
        stepping.short_backward(loss, torch.ones(()))


def scheduled(rule):
    torch.optim.lr_scheduler.StepLR(rule, 1)


def hooked(rule):
    rule.register_step_pre_hook(lambda optimizer, args, kwargs: None)


@pytest.mark.parametrize("watch", [scheduled, hooked])
def test_a_step_that_somebody_watches_stays_whole(rule, watch):
    watch(rule)
    assert short_step(rule) == rule.step


def test_a_profiler_sees_packed_steps_by_name(rule):
    with torch.autograd.profiler.profile() as profile:
        short_step(rule)()
    assert any("Optimizer.step#SGD" in event.name for event in profile.function_events)


def test_packs_of_any_size_learn_bit_for_bit_the_same_with_dropout_and_norms():
    found = [trained(Finetune(), OPTIMIZERS["SGD"], pack, model=noisy())[0] for pack in (2, 3, 64)]
    for other in found[1:]:
        assert all(torch.equal(found[0][n], w) for n, w in other.items())


def test_the_engine_is_the_plain_loop():
    stream = make_stream(tasks=2)
    by_engine, by_hand = make_learner(stream), make_learner(stream)
    engine = make_engine(by_engine, GPM(0.8), epochs=3)
    strategy = GPM(0.8)
    for task in stream:
        engine.learn(task, Plan(task.train))
        learn(by_hand, strategy, task, epochs=3)
    for n, weight in weights(by_hand).items():
        torch.testing.assert_close(weights(by_engine)[n], weight)


@pytest.mark.parametrize("pack", [1, 4])
def test_the_mean_loss_of_an_epoch(pack):
    stream = make_stream(tasks=1, n=40)
    learner = make_learner(stream, optimizer=functools.partial(SGD, lr=0.0), pack=pack)
    seen = []

    class Watching(Finetune):
        def after_epoch(self, learner, task, progress):
            seen.append((progress.epoch, progress.max_epochs, progress.train_loss))

    make_engine(learner, Watching(), epochs=2, pack=pack).learn(stream[0], Plan(stream[0].train))
    batch = stream[0].everything
    loss = float(learner.loss(learner(batch), batch).detach())
    assert seen == [(1, 2, pytest.approx(loss, rel=1e-5)), (2, 2, pytest.approx(loss, rel=1e-5))]
