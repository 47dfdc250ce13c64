"""Merging where a task trains low-rank pairs: Core Space, and where OSRM lets pairs read."""

import functools

import pytest
import torch
from torch.optim import Adam
from toys import make_engine, make_learner, make_stream

from cl_bench.contracts import UsageError
from cl_bench.merging import core_space, make_rule, osrm_rows, to_core
from cl_bench.strategies.merging.merge import Merge

TASKS, RANK = 3, 2
ADAM = functools.partial(Adam, lr=0.02)


class Watched(Merge):
    """Keeps what tasks began with, their pairs, and what they read."""

    def __init__(self, **options):
        super().__init__(train="pairs", pair_rank=RANK, **options)
        self.starts, self.pairs_, self.models, self.first, self.read = [], [], [], [], []

    def setup(self, learner, task):
        self.starts.append(copied(learner))
        super().setup(learner, task)
        self.read.append(dict(self.pairs.now))
        self.first.append({n: layer.A.detach().clone() for n, layer in self.pairs.layers.items()})

    def consolidate(self, learner, task, stats):
        made = {n: layer.factors() for n, layer in self.pairs.layers.items()}
        self.pairs_.append({n: tuple(f.detach().clone() for f in pair) for n, pair in made.items()})
        super().consolidate(learner, task, stats)


def copied(learner):
    return {name: w.clone() for name, w in learner.weights().items()}


def run(scenario="domain", tasks=TASKS, strategy=None, **options):
    stream = make_stream(scenario, tasks, subspace=5)
    strategy = strategy or Watched(**options)
    learner = make_learner(stream, optimizer=ADAM)
    engine, ends = make_engine(learner, strategy), []
    for t in range(tasks):
        engine.learn(stream[t], strategy.plan(stream, t))
        ends.append(copied(learner))
    return strategy, ends, learner


def names(strategy):
    return [f"{n}.weight" for n in strategy.pairs_[0]]


def taus(strategy, count=TASKS):
    """Whole task vectors, in double precision."""
    base = strategy.base
    found = []
    for t in range(count):
        begun = {n: strategy.starts[t][n].double() - base[n].double() for n in names(strategy)}
        made = {f"{n}.weight": b.double() @ a.double() for n, (b, a) in strategy.pairs_[t].items()}
        found.append({n: begun[n] + made[n] for n in begun})
    return found


@pytest.mark.parametrize("rule", ["average", "opcm", "iso_c"])
def test_whole_matrices_are_merged_from_what_pairs_have_added(rule):
    strategy, ends, _ = run(rule=rule)
    frozen = set(ends[0]) - set(strategy.base)
    for end in ends:
        assert end.keys() == strategy.base.keys() | frozen
        assert all(torch.equal(end[n], strategy.starts[0][n]) for n in frozen)
    assert all(torch.equal(s[n], strategy.base[n]) for s in strategy.starts for n in strategy.base)
    vectors = taus(strategy)
    for name in names(strategy):
        rank = torch.linalg.matrix_rank(
            ends[-1][name].double() - strategy.base[name].double(), 1e-5
        )
        assert rank <= TASKS * RANK
        if rule == "average":
            wanted = sum(v[name] for v in vectors) / TASKS + strategy.base[name]
            torch.testing.assert_close(ends[-1][name].double(), wanted, atol=1e-6, rtol=0)


def test_pairs_span_a_core_without_loss():
    """Through the strategy's own factors: of three tasks, each 24 x 12 or so and of rank 2."""
    strategy, _, _ = run(rule="core_space", inner="average", init="merge")
    for name in names(strategy):
        factors = [model[name] for model in strategy.cores.models]
        cores, u, vh = to_core(factors)
        for core, (b, a) in zip(cores, factors, strict=True):
            whole = b.double() @ a.double()
            assert (u @ core @ vh - whole).abs().max() <= 1e-10 * whole.abs().max()


@pytest.mark.parametrize(
    ("init", "deploy"), [("initial", "merge"), ("last", "merge"), ("merge", "latest")]
)
def test_linear_rules_come_to_the_same_in_both_spaces(init, deploy):
    options = {"init": init, "deploy": deploy}
    core, ends, _ = run(rule="core_space", inner="average", **options)
    whole, others, _ = run(rule="average", **options)
    for one, other in zip((*core.starts, *ends), (*whole.starts, *others), strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name], atol=2e-5, rtol=0)
    mean = {n: sum(v[n] for v in taus(core)) / TASKS for n in names(core)}
    for name, (b, a) in core.cores.merged.items():
        torch.testing.assert_close(b.double() @ a.double(), mean[name], atol=1e-5, rtol=0)
    assert bool(core.cores.models[-1][names(core)[0]][1].shape[0] > RANK) == (init != "initial")


def test_rules_on_entries_see_the_core_and_a_shared_head_beside_it():
    strategy, ends, _ = run(rule="core_space", inner="ties", top=0.5)
    models = [
        {f"{n}.weight": tuple(f.double() for f in pair) for n, pair in made.items()}
        for made in strategy.pairs_
    ]
    heads = [one["heads.0.weight"] for one in strategy.cores.others]
    assert "heads.0.weight" in strategy.base
    rule = make_rule("ties", {"top": 0.5})
    alone = core_space(models, rule)
    gaps = []
    for name in names(strategy):
        found = ends[-1][name].double() - strategy.base[name].double()
        gaps.append(float((found - alone[name]).abs().max()))
    # What TIES trims is decided over all weights, the head's among them.
    assert max(gaps) > 1e-4
    assert all(h.abs().max() > 0 for h in heads)
    own, ends, _ = run("task", rule="core_space", inner="ties", top=0.5)
    assert not any(own.cores.others)
    models = [{f"{n}.weight": pair for n, pair in made.items()} for made in own.pairs_]
    wanted = core_space(models, rule)
    for name in names(own):
        torch.testing.assert_close(ends[-1][name], own.base[name] + wanted[name])


@pytest.mark.parametrize("start", ["osrm_mean", "osrm_moments"])
@pytest.mark.parametrize("freeze", [False, True])
def test_osrm_lets_pairs_read_where_tasks_before_have_nothing(start, freeze):
    strategy, _, _ = run(rule="average", pair_start=start, pair_freeze_a=freeze)
    for t in (1, 2):
        for name, A in strategy.first[t].items():
            A = A.double()
            torch.testing.assert_close(A @ A.t(), torch.eye(RANK).double(), atol=1e-6, rtol=0)
            past = sum(strategy.read[s][name] for s in range(t))
            least = torch.linalg.eigvalsh(past)[:RANK].sum().clamp(min=0)
            assert (A @ past * A).sum() <= least + 1e-12 * past.trace()
            if start == "osrm_mean":  # one direction a task, so that something is always free
                assert (A @ past * A).sum() <= 1e-12 * past.trace()
    # Inputs of two tasks fill 10 of the first layer's 12 dimensions: there is room for rank 2.
    first = next(iter(strategy.first[0]))
    past = strategy.read[0][first] + strategy.read[1][first]
    A = strategy.first[2][first].double()
    assert (A @ past * A).sum() <= 1e-12 * past.trace()
    own = strategy.read[2][first]
    assert (A @ own * A).sum() >= (1e-3 if start == "osrm_moments" else 0) * own.trace()
    moved = [
        not torch.equal(strategy.first[t][n], strategy.pairs_[t][n][1])
        for t in range(TASKS)
        for n in strategy.first[t]
    ]
    assert not any(moved) if freeze else all(moved)


def test_means_of_tasks_before_are_not_read():
    stream = make_stream("domain", 3)
    strategy, learner = Merge(train="pairs", pair_rank=2, pair_start="osrm_mean"), None
    learner = make_learner(stream, optimizer=ADAM)
    engine, means = make_engine(learner, strategy), []
    for t, task in enumerate(stream):
        engine.learn(task, strategy.plan(stream, t))
        batch = task.sample(100, learner.seed)
        means.append(batch["x"].double().mean(0))  # what the first layer reads
    learner.begin(stream[2], strategy, "initial")
    A = strategy.pairs.layers["backbone.fc1"].A.double()
    for mean in means:
        assert (A @ mean).norm() <= 1e-6 * mean.norm()
    strategy.release(learner)


def test_least_energy_and_a_fair_draw_where_there_is_none():
    x = torch.randn(30, 8, dtype=torch.float64) @ torch.diag(torch.arange(8.0, 0, -1)).double()
    C = x.t() @ x
    A = osrm_rows(C, 3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        A @ C @ A.t(), torch.diag(torch.linalg.eigvalsh(C)[:3]), atol=1e-9, rtol=1e-9
    )
    flat = x.clone()
    flat[:, 3:] = 0
    rows = [osrm_rows(flat.t() @ flat, 2, torch.Generator().manual_seed(i)) for i in range(2)]
    for A in rows:
        assert (flat @ A.t()).abs().max() < 1e-12 * flat.abs().max() * 100
        torch.testing.assert_close(A @ A.t(), torch.eye(2).double())
    assert (rows[0] @ rows[1].t()).norm() < 1.2  # not the same two of five
    with pytest.raises(ValueError, match="rank=9"):
        osrm_rows(C, 9, torch.Generator())


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "core_space", "inner": "dare", "init": "merge", "pair_start": "osrm_mean"},
        {"rule": "core_space", "inner": "opcm", "init": "last", "pair_start": "osrm_moments"},
        {"rule": "ties", "init": "last"},
    ],
    ids=str,
)
def test_what_is_saved_is_all_that_the_next_fold_needs(options):
    make = functools.partial(Merge, train="pairs", pair_rank=RANK, **options)
    stream, one, other = make_stream(tasks=3), make(), make()
    learner, second = (make_learner(stream, optimizer=ADAM) for _ in range(2))
    engine = make_engine(learner, one)
    for t in range(2):
        engine.learn(stream[t], one.plan(stream, t))
    second.load_weights({k: v.clone() for k, v in learner.weights().items()})
    other.load_state_dict(one.state_dict())
    engine.learn(stream[2], one.plan(stream, 2))
    make_engine(second, other).learn(stream[2], other.plan(stream, 2))
    assert all(torch.equal(w, second.weights()[n]) for n, w in learner.weights().items())
    sizes = [v["merge_bytes"] for v in one.metrics().values()]
    assert len(sizes) == 2
    assert min(sizes) > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rule": "core_space"}, "strategy.rule=core_space: .*strategy.train=pairs"),
        ({"rule": "dare", "inner": "opcm"}, "strategy.inner=opcm: with strategy.rule=dare"),
        ({"train": "pairs", "pair_start": "osrm"}, "strategy.pair_start=osrm"),
    ],
)
def test_what_has_no_factors_or_is_no_option_is_refused(options, said):
    with pytest.raises(UsageError, match=said):
        Merge(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pair_rank": 20}, "strategy.pair_rank=20: layer backbone.fc1 is a matrix of 24 x 12"),
        ({"pair_targets": ["conv"]}, r"strategy.pair_targets=\[conv\]: 'conv' is no layer"),
    ],
)
def test_what_does_not_fit_the_network_is_refused_before_work(options, said):
    with pytest.raises(UsageError, match=said):
        Merge(train="pairs", **options).check(make_learner(make_stream()))
