"""Strategies side by side: who decides, what adds up, in which order."""

import copy
import functools

import pytest
import torch
from states import assert_goes_on_the_same, penalty_at, with_quadratics
from torch.optim import SGD, Adam
from toys import CLASSES, DIM, learn, learn_stream, make_learner, make_stream, mlp, weights

from cl_bench.contracts import EpochDecision, Needs, Strategy, UsageError
from cl_bench.contracts.strategy import overrides
from cl_bench.experiment import Together
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.baselines.joint import Joint, Union
from cl_bench.strategies.isolation.freeze import Freeze
from cl_bench.strategies.penalty.ewc import EWC
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.strategies.replay.er import ER


def test_two_that_rewrite_gradients_are_refused():
    with pytest.raises(UsageError, match=r"gpm and other both rewrite gradients.*run one of them"):
        Together({"gpm": GPM(), "er": ER(), "other": GPM()})


class Deciding(Strategy):
    def __init__(self, decision=None):
        self.decision = decision

    def after_epoch(self, learner, task, progress):
        return self.decision


def test_two_answers_to_one_question_are_refused():
    with pytest.raises(UsageError, match=r"one and two both decide 'plan'.*run one of them"):
        Together({"one": Joint(), "er": ER(), "two": Joint()})
    both = Together({"er": ER(), "joint": Joint()})
    assert isinstance(both.plan(make_stream(), 1).data, Union)


def test_decisions_after_an_epoch_add_up():
    def decided(*decisions):
        members = {str(i): Deciding(d) for i, d in enumerate(decisions)}
        return Together(members).after_epoch(None, None, None)

    assert decided(None, None) is None
    assert decided(None, EpochDecision(stop=True)) == EpochDecision(stop=True)
    slower = EpochDecision(scale_rate=0.5), EpochDecision(scale_rate=0.2, reset_rate=True)
    assert decided(*slower) == EpochDecision(scale_rate=0.1, reset_rate=True)
    assert decided(EpochDecision(rebuild_optimizer=True), *slower).rebuild_optimizer


def test_needs_of_companions_add_up():
    class Text(Strategy):
        needs = Needs(task_id_at_test=True, shardable=False, modalities=frozenset({"text", "x"}))

    class Image(Strategy):
        needs = Needs(modalities=frozenset({"image", "x"}))

    needs = Together({"gpm": GPM(), "text": Text(), "image": Image()}).needs
    assert needs == Needs(True, True, False, modalities=frozenset({"x"}))


def test_penalties_are_summed():
    stream, learner, one, _ = with_quadratics(tasks=1)
    _, _, other, _ = with_quadratics(tasks=2, strength=3.0)
    theta = torch.randn(CLASSES, DIM)
    both = Together({"one": one, "er": ER(), "other": other})
    found = [penalty_at(s, learner, stream, theta) for s in (one, other, both)]
    assert found[2][0] == pytest.approx(found[0][0] + found[1][0], rel=1e-5)
    torch.testing.assert_close(found[2][1], found[0][1] + found[1][1])
    nothing = Together({"er": ER(), "finetune": Finetune()})
    assert nothing.penalty(learner, stream[0].everything, torch.empty(0)) is None


def make_three():
    return Together({"gpm": GPM(0.8, samples=40), "er": ER(20), "ewc": EWC(5.0, samples=20)})


def test_states_of_companions_are_apart():
    one, other = assert_goes_on_the_same(make_three)
    state = one.state_dict()
    assert list(state) == ["gpm", "er", "ewc"]
    assert {"memory", "rows_per_sample"} <= set(state["gpm"])
    assert set(state["er"]) == {"buffer", "seen", "rng"}
    assert set(state["ewc"]) == {"information", "centre", "tasks"}
    for a, b in zip(one.members, other.members, strict=True):
        assert a.metrics() == b.metrics()


def test_a_companion_of_two_layers_of_names_keeps_its_statistics():
    stream = make_stream()
    learner = make_learner(stream)
    alone, both = (
        EWC(samples=20),
        Together({"a": Finetune(), "a/b": Finetune(), "ewc": EWC(samples=20)}),
    )
    learn(learner, alone, stream[0], epochs=0)
    learn(learner, both, stream[0], epochs=0)
    assert list(both.members[2].information) == list(alone.information)
    for n, f in alone.information.items():
        assert torch.equal(both.members[2].information[n], f)


def test_a_companion_that_does_nothing_changes_nothing():
    stream = make_stream()
    found = []
    for strategy in (GPM(0.8), Together({"gpm": GPM(0.8), "finetune": Finetune()})):
        learner = make_learner(stream, optimizer=functools.partial(Adam, lr=0.01))
        learn_stream(learner, strategy, stream)
        found.append(weights(learner))
    assert all(torch.equal(found[0][n], w) for n, w in found[1].items())


def test_frozen_blocks_stay_frozen_beside_gpm():
    stream = make_stream()
    learner = make_learner(
        stream, mlp(bias=True), functools.partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.01)
    )
    both = Together({"gpm": GPM(0.8, samples=40), "freeze": Freeze(1)})
    learn(learner, both, stream[0])
    before = copy.deepcopy(learner.backbone.fc1.state_dict())
    for task in stream.tasks[1:]:
        learn(learner, both, task)
    assert all(torch.equal(before[k], v) for k, v in learner.backbone.fc1.state_dict().items())


def test_order_of_hooks():
    calls = []

    class Spy(Strategy):
        def __init__(self, name):
            self.name = name

        def setup(self, learner, task):
            calls.append(("setup", self.name))

        def on_batch(self, learner, batch):
            calls.append(("on_batch", self.name))
            return batch

        def constrain(self, learner):
            calls.append(("constrain", self.name))

        def after_step(self, learner, batch, out):
            calls.append(("after_step", self.name))

        def release(self, learner):
            calls.append(("release", self.name))

    stream = make_stream(n=10)
    learn(make_learner(stream), Together({"a": Spy("a"), "b": Spy("b")}), stream[0], epochs=1)
    hooks = ("setup", "on_batch", "constrain", "after_step")
    expected = [(hook, name) for hook in hooks for name in "ab"]
    assert calls == [*expected, ("release", "b"), ("release", "a")]


def test_what_others_ask_of_a_strategy_it_declares():
    assert (Finetune.bound, Joint.bound, GPM.bound) == ("lower", "upper", None)
    stopping, going = Freeze(early_stop=0.9), Freeze()
    assert overrides(stopping, "after_epoch")
    assert not overrides(going, "after_epoch")
    assert not overrides(Together({"freeze": going, "er": ER()}), "after_epoch")
    assert overrides(Together({"er": ER(), "freeze": stopping}), "after_epoch")
    assert going.needs.said("first_task", 1) == "strategy.start_task=1"
    assert Needs(first_task=2).said("first_task", 2) == "first_task=2"
    er = ER()
    assert er.members == (er,)
