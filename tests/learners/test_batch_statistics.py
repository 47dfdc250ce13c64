"""Networks that normalise by the batch, and outputs that are not finite."""

import functools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toys import DIM, ToyTask, learn, make_engine, make_learner, make_stream

from cl_bench.contracts import Plan, Stream, UsageError, batch_sizes, generator
from cl_bench.data import MemoryData
from cl_bench.experiment import EvalLoader, Plateau, TrainLoader, check_batches
from cl_bench.experiment.probes.untouched import measure
from cl_bench.federation import Federation, check_shares
from cl_bench.federation.partition import Part, in_order
from cl_bench.learners import DivergedError
from cl_bench.learners.observed import judge
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.penalty.ewc import EWC
from cl_bench.strategies.projection.adam_nscl import AdamNSCL
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.subspace import unconfined

NONE = {"eval.batch_size": None}


def network(tracks=False, width=8):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(DIM, width), nn.BatchNorm1d(width, track_running_stats=tracks), nn.ReLU()
    )


def convolutions():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), nn.Flatten()
    )


def sorted_stream(n=60, classes=3, tasks=1):
    """Samples stored class by class, as folders of classes are."""
    made = []
    for t in range(tasks):
        rng = generator(0, "sorted", t)
        y = torch.arange(n) * classes // n
        x = torch.randn(n, DIM, generator=rng) + 3 * F.one_hot(y, DIM)
        made.append(ToyTask(t, 0, range(classes), x, y))
    return Stream("sorted", made, "domain", (DIM,), "sorted")


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        ((33, 16, 2), [16, 17]),
        ((33, 16, 1), [16, 16, 1]),
        ((34, 16, 2), [16, 16, 2]),
        ((1, 16, 2), [1]),
        ((17, 16, 2), [17]),
        ((32, 16, 2), [16, 16]),
        ((3, 1, 2), [1, 1, 1]),
        ((0, 4, 2), []),
    ],
)
def test_a_lone_last_sample_joins_the_batch_before(given, sizes):
    assert batch_sizes(*given) == sizes


@pytest.mark.parametrize("pack", [1, 2, 5])
def test_a_loader_hands_out_every_sample_once(pack):
    data = MemoryData({"x": torch.arange(41.0), "y": torch.arange(41)})
    loader = TrainLoader(data, 10, 0, 0, pack=pack, least=2)
    items = list(loader)
    assert len(items) == len(loader)
    assert sorted(torch.cat([i["y"].flatten() for i in items]).tolist()) == list(range(41))
    assert sum(map(loader.packs.batches_in, range(len(items)))) == loader.packs.steps == 4
    plain = torch.cat([b["y"].flatten() for b in TrainLoader(data, 10, 0, 0, pack=pack)])
    assert torch.equal(torch.cat([i["y"].flatten() for i in items]), plain)  # the same order


def test_clients_meet_no_lone_sample():
    data = MemoryData({"x": torch.arange(21.0), "y": torch.arange(21)})
    part = Part(data, torch.arange(21))
    batches = list(in_order(part, torch.arange(21).flip(0), 10, 2))
    assert [len(b["y"]) for b in batches] == [10, 11]
    assert torch.cat([b["y"] for b in batches]).tolist() == list(range(20, -1, -1))


def test_dependence_is_seen_in_the_modules():
    stream = make_stream()
    plain, running, by_batch = (
        make_learner(stream, model) for model in (None, network(True), network(False))
    )
    assert (plain.by_batch, plain.need_company, plain.least_batch) == ([], [], 1)
    assert (running.by_batch, running.need_company) == ([], ["backbone.1"])
    assert running.least_batch == 2
    assert by_batch.by_batch == by_batch.need_company == ["backbone.1"]
    images = make_learner(make_stream(shape=(1, 6, 6)), convolutions())
    assert (images.by_batch, images.need_company) == (["backbone.1"], [])  # 16 values a channel


def test_evaluation_mixes_classes_where_a_score_depends_on_its_batch():
    stream = sorted_stream()
    learner = make_learner(stream, network())
    learn(learner, Finetune(), stream[0], epochs=20)
    engine = make_engine(learner, Finetune())
    scores = {b: engine.evaluate(stream, b, None)["t0"] for b in (60, 20)}
    batches = [x["y"] for x in EvalLoader(stream[0].test, 20, mixed=learner.mixed(stream[0]))]
    assert all(len(y.unique()) == 3 for y in batches)
    assert scores[60] > 0.9
    assert scores[20] > 0.8
    learner.eval()
    with torch.no_grad():  # the control: one class a batch is centred away
        hits = [learner.score(learner(b), b) for b in EvalLoader(stream[0].test, 20)]
    assert float(torch.cat(hits).mean()) < 0.7
    assert measure(learner, stream[0], stream[0].test, 20, None)[0] == scores[20]


def test_the_order_follows_from_seed_and_task_alone():
    data = MemoryData({"y": torch.arange(41)})

    def order(seed, task):
        batches = list(EvalLoader(data, 10, mixed=(seed, task)))
        assert [len(b["y"]) for b in batches] == [10, 10, 10, 11]
        return torch.cat([b["y"] for b in batches]).tolist()

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(*key)) for key in ((0, 0), (0, 1), (1, 0))}) == 3
    assert sorted(order(0, 0)) == list(range(41))
    assert make_learner(make_stream()).mixed(make_stream()[0]) is None


@pytest.mark.parametrize("tracks", [True, False])
@pytest.mark.parametrize("strategy", [Finetune, functools.partial(GPM, samples=41), EWC, AdamNSCL])
def test_a_lone_last_sample_stops_nobody(strategy, tracks):
    stream = sorted_stream(41, tasks=2)
    learner = make_learner(stream, network(tracks))
    made = strategy()
    engine = make_engine(learner, made, epochs=1)
    for task in stream:
        engine.learn(task, Plan(task.train))
    scores = engine.evaluate(stream, 20, None)
    assert all(0 <= s <= 1 for s in scores.values())


def test_fisher_information_of_a_sample_is_taken_within_its_batch():
    stream = sorted_stream(20)
    learner = make_learner(stream, network())
    learner.begin(stream[0], EWC())
    batch = stream[0].everything
    found = learner.gradients(batch, per_sample=True)
    learner.eval()
    losses = F.cross_entropy(learner(batch), batch["y"], reduction="none")
    names = list(learner.named_trainable())
    for i in (0, 7, 19):
        expected = torch.autograd.grad(
            losses[i], [learner.named_trainable()[n] for n in names], retain_graph=True
        )
        for name, gradient in zip(names, expected, strict=True):
            torch.testing.assert_close(found[name][i], gradient)
    mean = learner.gradients(batch)
    for name in names:
        torch.testing.assert_close(found[name].mean(0), mean[name], atol=1e-6, rtol=1e-4)


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that an operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.numbers = max(self.numbers, *made, 0)
        return out


@pytest.mark.parametrize("within", [True, False])
def test_squares_of_a_large_network_are_added_up_without_all_gradients(within, monkeypatch):
    stream = sorted_stream(20)
    wide = [nn.Linear(DIM, 300), nn.ReLU(), nn.Linear(300, 300)]
    norm = [nn.BatchNorm1d(300, track_running_stats=False)] if within else []
    learner = make_learner(stream, nn.Sequential(*wide, *norm))
    ewc = EWC(fisher="empirical", samples=20)
    learner.begin(stream[0], ewc)
    every = learner.gradients(stream[0].everything, per_sample=True)
    small = ewc.collect(learner, stream[0])
    monkeypatch.setattr("cl_bench.contracts.task.AT_ONCE", 1)
    with Largest() as largest:
        found = ewc.collect(learner, stream[0])
    assert largest.numbers <= 300 * 300
    for name, gradients in every.items():
        expected = gradients.square().sum(0)
        torch.testing.assert_close(small[name], expected, atol=1e-9, rtol=1e-5)
        torch.testing.assert_close(found[name], expected, atol=1e-9, rtol=1e-5)


@pytest.mark.parametrize("of", ["loss", "logits"])
def test_both_ways_to_single_samples_agree_where_no_batch_matters(of, monkeypatch):
    stream = make_stream()
    learner = make_learner(stream)
    learner.begin(stream[0], Finetune())
    batch = stream[0].sample(6, 0)
    with unconfined():
        apart = learner.gradients(batch, of, per_sample=True)
        monkeypatch.setattr(type(learner), "by_batch", ["made up"])
        within = learner.gradients(batch, of, per_sample=True)
    for name, expected in apart.items():
        torch.testing.assert_close(within[name], expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("tracks", "n", "batch_size", "scored", "named"),
    [
        (True, 20, 1, NONE, "batch_size=1"),
        (True, 1, 8, NONE, "one training sample"),
        (False, 20, 8, {"eval.batch_size": 1}, "eval.batch_size=1"),
        (False, 20, 8, {"eval.max_samples": 1}, "eval.max_samples=1"),
        (True, 20, 8, {"eval.batch_size": 1}, None),
        (False, 20, 8, NONE, None),
    ],
)
def test_what_could_meet_a_lone_sample_is_refused_before_the_run(
    tracks, n, batch_size, scored, named
):
    stream = sorted_stream(n)
    learner = make_learner(stream, network(tracks))
    if named is None:
        check_batches(stream, learner, batch_size, scored, validated=True)
        return
    with pytest.raises(UsageError, match=named):
        check_batches(stream, learner, batch_size, scored, validated=True)


def test_clients_with_one_sample_are_refused():
    stream = sorted_stream(21)
    check_shares(Federation(clients=10, per_round=2), stream, 0)
    with pytest.raises(UsageError, match="gets one sample of task 't0'"):
        check_shares(Federation(clients=11, per_round=2), stream, 0)


class Ruin(Finetune):
    """The last step of the task leads where float32 ends."""

    def after_step(self, learner, batch, out):
        with torch.no_grad():
            learner.heads[0].weight.fill_(3e38)


@pytest.mark.parametrize("what", ["after a task", "test", "validation", "before"])
def test_outputs_that_are_not_finite_stop_the_run(what):
    stream = make_stream(tasks=1)
    learner = make_learner(stream)
    strategy = Ruin() if what == "after a task" else Finetune()
    engine = make_engine(learner, strategy, epochs=1, batch_size=40)
    if what != "before":
        learner.begin(stream[0], strategy)
    if what == "after a task":
        with pytest.raises(DivergedError, match="training data are not finite in task 't0'"):
            engine.learn(stream[0], Plan(stream[0].train))
        return
    with torch.no_grad():
        learner.heads[0].weight.fill_(torch.nan)
    if what == "validation":
        learner.on_validation_epoch_start()
        with torch.no_grad():
            learner.validation_step(stream[0].everything, 0)
        with pytest.raises(DivergedError, match="validation loss became nan"):
            learner.validation_loss()
        return
    with pytest.raises(DivergedError, match="test data of task 't0' are not finite"):
        engine.evaluate(stream, 10, None)
    scores, _ = judge(learner, stream[0].everything, stream[0])
    assert bool(scores.isnan().all())  # what only watches goes on, and says so


def test_classes_left_out_on_purpose_are_finite():
    learner = make_learner(make_stream())
    out = torch.tensor(
        [[-torch.inf, 1.0], [-torch.inf, -torch.inf], [torch.inf, 0], [torch.nan, 0]]
    )
    assert learner.finite(out, {}).tolist() == [True, False, False, False]


def test_a_plateau_measures_mixed_batches(monkeypatch):
    stream = sorted_stream()
    seen = []
    learner = make_learner(stream, network(), functools.partial(SGD, lr=0.1))
    monkeypatch.setattr(
        type(learner),
        "validation_step",
        lambda self, batch, i: seen.append(len(batch["y"].unique())),
    )
    monkeypatch.setattr(type(learner), "validation_loss", lambda self: 1.0)
    engine = make_engine(learner, Finetune(), epochs=1)
    object.__setattr__(engine.settings, "schedule", Plateau())
    object.__setattr__(engine.settings, "validation_batch_size", 20)
    engine.learn(stream[0], Plan(stream[0].train))
    assert set(seen) == {3}
