"""TRGP: trust regions, scaling, and the spaces that it remembers."""

import pytest
import torch
from family import NETWORKS, OPTIMIZERS, assert_orthonormal, feed, make, setting, sgd
from torch import nn
from toys import accuracy, learn, learn_stream, make_engine, make_learner

from cl_bench.contracts import Plan, UsageError
from cl_bench.experiment import check_pair
from cl_bench.strategies.projection.trgp import TRGP
from cl_bench.tasks.permuted_digits import PermutedDigits


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("scenario", ["task", "domain"])
def test_old_tasks_answer_as_before_with_their_own_scaling(network, scenario):
    stream, learner = setting(network, n=6, subspace=3, scenario=scenario)
    trgp = TRGP(threshold=1.0, samples=40, rank_rule="energy", trust=0.1)
    answers = {}
    for task in stream:
        learn(learner, trgp, task, epochs=10)
        learner.eval()
        with torch.no_grad(), trgp.inference(learner, task):
            answers[task.index] = learner(task.everything)
    trusted = [by for stored in trgp.stored.values() for by in stored.values()]
    assert any(trusted)
    for task in stream:
        learner.eval()
        seen = answers[task.index]
        with torch.no_grad(), trgp.inference(learner, task):
            now = learner(task.everything)[:, : seen.shape[1]]
        torch.testing.assert_close(now, seen, atol=2e-3, rtol=1e-3)
    with torch.no_grad():
        shared = learner(stream[2].everything)
    if any(trgp.stored[2].values()):
        assert not torch.allclose(shared, answers[2])


@pytest.mark.parametrize("quirks", [False, True])
@pytest.mark.parametrize("network", NETWORKS)
def test_the_memory_holds_every_task_subspace_unless_the_off_by_one_is_asked_for(network, quirks):
    stream, learner = setting(network)
    trgp = make("trgp", network, official_quirks=quirks)
    learn_stream(learner, trgp, stream, epochs=3)
    outside = 0.0
    for name, bases in trgp.subspaces.items():
        M = trgp.memory[name]
        for B in bases:
            assert_orthonormal(B)
            outside = max(outside, float((B - M @ (M.t() @ B)).norm()))
    assert outside > 0.5 if quirks else outside < 1e-6


def test_task_subspaces_reach_the_threshold_with_the_fewest_directions():
    rng = torch.Generator().manual_seed(0)
    decay = torch.logspace(0, -2, 10)[:, None].double()
    trgp = TRGP(threshold=0.9, rank_rule="energy")
    old, new = (torch.randn(10, 40, generator=rng).double() * decay for _ in range(2))
    feed(trgp, old)
    new = new.roll(1, 0)
    feed(trgp, new)
    B = trgp.subspaces["l"][1]
    held = (B.t() @ new).square().sum(1)
    assert float(held.sum()) >= 0.9 * float(new.square().sum())
    assert float(held.sum() - held.min()) < 0.9 * float(new.square().sum())


def test_the_trust_region_holds_the_tasks_that_the_gradient_points_at():
    trgp = TRGP(regions=2, trust=0.5)
    basis = torch.eye(6).double()
    trgp.subspaces["l"] = [basis[:, [0]], basis[:, [1]], basis[:, [2]]]
    G = torch.zeros(3, 6)
    G[0, :4] = torch.tensor([3.0, 2.0, 2.5, 0.5])
    assert trgp.trusted("l", G) == [0, 2]
    G[0, :4] = torch.tensor([1.0, 0.2, 0.3, 4.0])
    assert trgp.trusted("l", G) == []


def test_scaling_is_trained_apart_from_the_weights_and_without_decay():
    stream, learner = setting(optimizer=OPTIMIZERS["weight decay"])
    trgp = make("trgp", trust=0.1)
    learn(learner, trgp, stream[0], epochs=3)
    learner.begin(stream[1], trgp)
    weights_group, scales = learner.configure_optimizers().param_groups
    assert weights_group["weight_decay"] == 1e-2
    assert scales["weight_decay"] == 0
    before = accuracy(learner, stream[0])
    assert all(float(p.detach().norm()) == 0 for p in scales["params"])
    for p in scales["params"]:
        p.data.normal_()
    # A validation in the middle of a task: old tasks as they were, then back to training.
    with trgp.inference(learner, stream[0]):
        assert accuracy(learner, stream[0]) == before
    assert any("scalings" in m.__dict__ for m in learner.modules())
    trgp.release(learner)
    assert not any("scalings" in m.__dict__ for m in learner.modules())


def test_it_needs_the_task_id_and_a_permuted_stream_can_give_it():
    trgp = TRGP()
    with pytest.raises(UsageError, match=r"stream\.task_id_at_test=true"):
        check_pair("trgp", trgp, PermutedDigits(num_tasks=2))
    stream = PermutedDigits(num_tasks=2, task_id_at_test=True)
    check_pair("trgp", trgp, stream)
    assert stream.scenario == "domain"
    assert stream[:1].task_id_at_test
    assert stream[1].test[torch.arange(3)]["task"].tolist() == [1, 1, 1]
    assert "task" not in PermutedDigits(num_tasks=1)[0].test[torch.arange(3)]


def test_the_engine_scores_each_task_with_its_own_scaling():
    stream = PermutedDigits(num_tasks=3, task_id_at_test=True)
    learner = make_learner(stream, nn.Sequential(nn.Flatten(), nn.Linear(64, 32, bias=False)), sgd)
    trgp = TRGP(threshold=0.9, samples=100)
    engine = make_engine(learner, trgp, epochs=1)
    for task in stream:
        engine.learn(task, Plan(task.train))
    scores = engine.evaluate(list(stream), 500, None)
    for task in stream:
        learner.eval()
        with torch.no_grad(), trgp.inference(learner, task):
            batch = task.test[torch.arange(len(task.test))]
            expected = float(learner.score(learner(batch), batch).mean())
        assert scores[task.name] == pytest.approx(expected, abs=1e-6)
    assert min(scores.values()) > 0.5
