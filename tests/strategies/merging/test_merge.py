"""Continual merging: what training begins with, what is merged, what answers."""

import functools

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from toys import learn, make_engine, make_learner, make_stream, mlp

from cl_bench.contracts import UsageError
from cl_bench.merging import RULES, Average, cosine, make_rule, merge
from cl_bench.strategies.merging.merge import Merge

TASKS = 3


class Watched(Merge):
    """Keeps the weights that each task began with, and what it made of them."""

    def __init__(self, **options):
        super().__init__(**options)
        self.starts, self.models, self.moments = [], [], []

    def setup(self, learner, task):
        super().setup(learner, task)
        self.starts.append(copied(learner))

    def consolidate(self, learner, task, stats):
        self.models.append(copied(learner))
        if self.rule.needs_moments:
            moments = learner.second_moments().items()
            self.moments.append({k: v.clone() for k, v in moments})
        super().consolidate(learner, task, stats)


def copied(learner):
    return {name: w.clone() for name, w in learner.weights().items()}


def run(scenario="domain", model=None, optimizer=None, tasks=TASKS, **options):
    stream, strategy = make_stream(scenario, tasks), Watched(**options)
    learner = make_learner(stream, model, optimizer or functools.partial(Adam, lr=0.01))
    engine = make_engine(learner, strategy)
    ends = []
    for t, task in enumerate(stream):
        engine.learn(task, strategy.plan(stream, t))
        ends.append(copied(learner))
    return learner, strategy, ends


def merged_by_hand(learner, strategy, rule, count=TASKS):
    base, names = strategy.starts[0], [n for n, _ in learner.named_parameters()]
    matrices = {n for n, role in learner.roles().items() if role == "matrix"}
    pick = [{n: m[n] for n in names} for m in strategy.models[:count]]
    moments = strategy.moments[:count] or None
    return merge(rule, {n: base[n] for n in names}, pick, matrices, moments)


def same(one, other, **close):
    for name in one:
        torch.testing.assert_close(one[name], other[name], msg=name, **close)


@pytest.mark.parametrize("rule", [r for r in RULES if r != "dare"])
def test_after_each_task_the_network_is_the_merge_of_models_trained_apart(rule):
    learner, strategy, ends = run(rule=rule)
    for start in strategy.starts[1:]:
        same(strategy.starts[0], start, atol=0, rtol=0)  # theta_0, to the bit
    for t in range(TASKS):
        wanted = merged_by_hand(learner, strategy, make_rule(rule, {}), t + 1)
        same(wanted, ends[t], atol=1e-6, rtol=1e-5)


def test_with_dare_what_is_dropped_follows_from_the_seed():
    one, other = (run(rule="dare", inner="average", drop=0.9)[2][-1] for _ in range(2))
    same(one, other, atol=0, rtol=0)
    learner, strategy, ends = run(rule="dare", inner="average", drop=0.0)
    same(merged_by_hand(learner, strategy, Average()), ends[-1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("deploy", ["merge", "latest"])
@pytest.mark.parametrize("init", ["last", "merge"])
def test_training_begins_where_init_says_and_the_network_ends_as_deploy_says(init, deploy):
    learner, strategy, ends = run(rule="average", init=init, deploy=deploy)
    exact = {"atol": 0, "rtol": 0}
    for t in range(TASKS):
        merge_now = merged_by_hand(learner, strategy, Average(), t + 1)
        same(merge_now if deploy == "merge" else strategy.models[t], ends[t], atol=1e-6, rtol=1e-5)
        if t + 1 < TASKS and init == "last":
            same(strategy.models[t], strategy.starts[t + 1], **exact)
        elif t + 1 < TASKS:
            same(merge_now, strategy.starts[t + 1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("scenario", ["task", "class"])
def test_heads_of_one_task_each_stay(scenario):
    _, strategy, ends = run(scenario, rule="average")
    for t in range(TASKS):
        for name in (n for n in ends[-1] if n.startswith(f"heads.{t}.")):
            assert torch.equal(ends[-1][name], strategy.models[t][name])
    assert not any(name.startswith("heads") for name in strategy.base)


def test_a_shared_head_is_merged():
    _, strategy, ends = run("domain", rule="average")
    mean = sum(m["heads.0.weight"] for m in strategy.models) / TASKS
    torch.testing.assert_close(ends[-1]["heads.0.weight"], mean)


def normed():
    torch.manual_seed(1)
    return nn.Sequential(mlp(), nn.BatchNorm1d(24), nn.ReLU())


@pytest.mark.parametrize("policy", ["average", "latest"])
def test_running_statistics_go_by_the_policy(policy):
    _, strategy, ends = run(model=normed(), rule="opcm", batch_norm=policy)
    names = [n for n in ends[-1] if n.endswith(("running_mean", "running_var"))]
    assert len(names) == 2
    for name in names:
        seen = torch.stack([m[name] for m in strategy.models])
        assert not torch.allclose(seen[0], seen[-1])
        wanted = seen.mean(0) if policy == "average" else seen[-1]
        torch.testing.assert_close(ends[-1][name], wanted)


@pytest.mark.parametrize(
    "options",
    [{"rule": r} for r in RULES] + [{"init": "last"}, {"init": "merge", "deploy": "latest"}],
    ids=str,
)
def test_what_is_saved_is_all_that_the_next_fold_needs(options):
    stream = make_stream(tasks=3)
    optimizer = functools.partial(Adam, lr=0.01)
    one, other = Merge(**options), Merge(**options)
    learner = make_learner(stream, optimizer=optimizer)
    engine = make_engine(learner, one)
    for t in range(2):
        engine.learn(stream[t], one.plan(stream, t))
    second = make_learner(stream, optimizer=optimizer)
    second.load_weights({k: v.clone() for k, v in learner.weights().items()})
    other.load_state_dict(one.state_dict())
    engine.learn(stream[2], one.plan(stream, 2))
    make_engine(second, other).learn(stream[2], other.plan(stream, 2))
    same(copied(learner), copied(second), atol=0, rtol=0)


def test_a_rule_that_weighs_by_moments_is_refused_at_the_first_step_without_any():
    strategy, stream = Merge(rule="ota"), make_stream()
    learner = make_learner(stream, optimizer=functools.partial(SGD, lr=0.1))
    with pytest.raises(UsageError, match="SGD keeps no second moment"):
        make_engine(learner, strategy).learn(stream[0], strategy.plan(stream, 0))
    assert learner.progress.step == 1
    assert Merge(rule="opcm").idle == {"after_step"}


def test_the_state_is_constant_where_the_rule_folds_and_its_bytes_are_told():
    for rule, growth in (("opcm", 1), ("ties", 1), ("tsv_m", 3)):
        sizes = []
        for tasks in (1, 3):
            _, strategy, _ = run(rule=rule, tasks=tasks)
            sizes.append(sum(v["merge_bytes"] for v in strategy.metrics().values()))
        assert sizes[1] == growth * sizes[0]
    fold = strategy.state_dict()["folds"]["backbone.fc1.weight"]
    told = strategy.metrics()["backbone.fc1"]["merge_bytes"]
    assert told == sum(4 * t.numel() for t in fold.values()) == 3 * 4 * 24 * 12


def test_metrics_are_of_the_newest_task_and_the_merge():
    _, strategy, ends = run(rule="average")
    name = "backbone.fc1.weight"
    base = strategy.starts[0][name]
    taus = [m[name] - base for m in strategy.models]
    merged = ends[-1][name] - base
    told = strategy.metrics()["backbone.fc1"]
    assert told["merge_cosine"] == pytest.approx(cosine(taus[-1], merged), abs=1e-4)
    mean = sum(float(t.norm()) for t in taus) / TASKS
    assert told["merge_norm_kept"] == pytest.approx(float(merged.norm()) / mean, rel=1e-3)
    opposed = taus[-1].abs()[taus[-1] * merged < 0].sum() / taus[-1].abs().sum()
    assert told["merge_contradicted"] == pytest.approx(float(opposed), abs=1e-4)
    u, s, _ = torch.linalg.svd(merged, full_matrices=False)
    shares = s.square().cumsum(0) / s.square().sum()
    rank = next(k + 1 for k, share in enumerate(shares) if share >= 0.95)
    aligned = (u[:, :rank].T @ taus[-1]).norm() / taus[-1].norm()
    assert told["merge_aligned"] == pytest.approx(float(aligned), abs=1e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rule": "core_space"}, "strategy.rule=core_space"),
        ({"init": "base"}, "strategy.init=base"),
        ({"top": 0.0}, "strategy.top=0.0"),
        ({"drop": 1.0, "rule": "dare"}, "strategy.drop=1.0"),
    ],
)
def test_an_option_that_is_none_is_refused(options, said):
    with pytest.raises(UsageError, match=said):
        Merge(**options)


def test_a_task_that_is_learned_in_a_plain_loop_is_merged_too():
    """``setup`` and ``consolidate`` suffice: a loop without plans trains on from the merge."""
    stream, strategy = make_stream(), Watched(rule="average")
    learner = make_learner(stream)
    for task in stream:
        learn(learner, strategy, task)
    same(merged_by_hand(learner, strategy, Average()), copied(learner), atol=1e-6, rtol=1e-5)
