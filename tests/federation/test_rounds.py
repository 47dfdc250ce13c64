"""Clients and rounds: who has which samples, who takes part, what is averaged."""

import torch
from federations import end_task, engine_of, split, total, whole
from hypothesis import given
from hypothesis import strategies as st
from toys import CLASSES, Silent, make_learner, make_stream, weights

from cl_bench.contracts import Plan
from cl_bench.federation import Federation, client_fit, partition, server_step, site
from cl_bench.federation.client import Turn, client_weights, load_weights
from cl_bench.federation.partition import ClientTask, Part
from cl_bench.federation.server import ServerOptimizerState
from cl_bench.strategies.federated.fedavg import FedAvg
from cl_bench.strategies.federated.fedprox import FedProx
from cl_bench.strategies.federated.fot import FOT
from cl_bench.strategies.penalty.ewc import EWC
from cl_bench.strategies.replay.er import ER
from cl_bench.tasks.permuted_digits import PermutedDigits


@given(
    kind=st.sampled_from(["iid", "shards", "dirichlet"]),
    clients=st.integers(1, 9),
    participation=st.sampled_from([1.0, 0.5]),
    seed=st.integers(0, 1000),
)
def test_every_sample_has_one_owner(kind, clients, participation, seed):
    task = make_stream(n=40)[1]
    settings = Federation(
        clients=clients, per_round=1, partition=kind, alpha=0.3, participation=participation
    )
    labels = task.data.tensors["y"]
    made = partition(task, labels, settings, seed)
    rows = torch.cat(list(made.rows.values()))
    assert torch.equal(rows.sort().values, torch.arange(40))
    assert made.counts.shape == (settings.population, CLASSES)
    assert int(made.counts.sum()) == 40
    assert all(len(r) for r in made.rows.values())
    assert made.version == partition(task, labels, settings, seed).version
    if kind == "iid":
        assert max(map(len, made.rows.values())) - min(map(len, made.rows.values())) <= 1
    if clients > 2:
        assert made.version != partition(task, labels, settings, seed + 1).version


def test_shards_hold_few_classes():
    task = PermutedDigits(num_tasks=1)[0]
    settings = Federation(clients=20, per_round=1, partition="shards")
    counts = partition(task, task.train.tensors["y"], settings, 0).counts
    assert int((counts > 0).sum(1).max()) <= 4  # two shards, each across one border at most
    mixed = Federation(clients=20, per_round=1, partition="dirichlet", alpha=1000.0)
    counts = partition(task, task.train.tensors["y"], mixed, 0).counts
    assert int((counts > 0).sum(1).min()) == 10


def test_only_clients_with_data_are_asked(monkeypatch):
    asked = []
    original = site.client_fit

    def noted(learner, strategy, weights, task, turn, *rest):
        asked.append((turn.task, turn.client, len(task.train)))
        return original(learner, strategy, weights, task, turn, *rest)

    monkeypatch.setattr(site, "client_fit", noted)
    stream = make_stream()
    settings = Federation(
        clients=8, per_round=8, rounds=2, participation=0.5, partition="dirichlet", alpha=0.05
    )
    engine = engine_of(make_learner(stream), FedAvg(), settings)
    for task in stream:
        engine.learn(task, Plan(task.train))
        held = (engine.history.counts[task.index].sum(1) > 0).nonzero().squeeze(1).tolist()
        assert {k for t, k, _ in asked if t == task.index} == set(held)
        assert len(held) <= 8
        assert engine.history.counts[task.index].shape[0] == 16
    assert all(n for _, _, n in asked)
    assert len({k for _, k, _ in asked}) > 8  # other clients in other tasks


def test_a_round_that_everybody_misses_changes_nothing(monkeypatch):
    stream = make_stream(tasks=2)
    learner, strategy = make_learner(stream), FOT()
    engine = engine_of(learner, strategy)
    monkeypatch.setattr(engine, "_reporting", lambda turns: [])
    before = weights(learner)
    for task in stream:
        engine.learn(task, Plan(task.train))
    for name, value in weights(learner).items():
        assert torch.equal(value, before[name])
    assert strategy.basis == {}


def test_drop_outs_are_left_out_of_the_mean():
    stream = make_stream(tasks=1, n=60)
    engine = engine_of(make_learner(stream), FedAvg(), Federation(10, 10, 30, drop_outs=0.5))
    counted = []
    engine.record.round = None

    class Kept(Silent):
        def round(self, **event):
            counted.append(event)

    engine.record = Kept()
    engine.learn(stream[0], Plan(stream[0].train))
    dropped = [event["dropped"] for event in counted]
    assert 0.35 < sum(dropped) / 300 < 0.65
    assert all(event["steps"] == 10 - lost for event, lost in zip(counted, dropped, strict=True))


def test_weighting_by_samples_is_the_mean_over_samples():
    stream = make_stream(tasks=1, n=40)
    task = stream[0]
    parts = [ClientTask(task, Part(task.train, r)) for r in (torch.arange(4), torch.arange(4, 40))]
    found = {}
    for by_samples in (False, True):
        learner = make_learner(stream, batch_size=40)
        before = client_weights(learner)
        uploads = [
            client_fit(learner, FedAvg(), before, part, Turn(0, 0, 0, k), 1, by_samples)
            for k, part in enumerate(parts)
        ]
        load_weights(learner, before)
        optimizer = ServerOptimizerState(None, before)
        after = server_step(learner, FedAvg(), before, total(uploads), optimizer)
        found[by_samples] = after["backbone.fc1.weight"] - before["backbone.fc1.weight"]
        changes = [u.sums["update/backbone.fc1.weight"] / u.sums["weight"].float() for u in uploads]
    a, b = changes
    torch.testing.assert_close(found[False], (a + b) / 2, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found[True], 0.1 * a + 0.9 * b, atol=1e-6, rtol=1e-4)


def test_fedprox_pulls_to_the_rounds_weights():
    stream = make_stream(tasks=1)
    moved = {}
    for mu in (0.0, 1.0, 10.0):
        learner, strategy = make_learner(stream), FedProx(mu)
        before = client_weights(learner)
        upload = client_fit(learner, strategy, before, whole(stream[0]), Turn(0, 0, 0, 0), 5)
        moved[mu] = float(upload.sums["update/backbone.fc1.weight"].norm())
        assert strategy.start == {}
    plain = client_fit(learner, FedAvg(), before, whole(stream[0]), Turn(0, 0, 0, 0), 5)
    assert moved[0.0] == float(plain.sums["update/backbone.fc1.weight"].norm())
    assert moved[10.0] < moved[1.0] < moved[0.0]


def test_clients_keep_their_replay_memory_to_themselves():
    stream = make_stream()
    strategy = ER(memory=10)
    engine = engine_of(make_learner(stream), strategy, Federation(4, 4, 2))
    first = {}
    for task in stream:
        engine.learn(task, Plan(task.train))
        assert strategy.buffer == {}  # the server has none
        for client, state in engine.site.private.items():
            own = engine.site._tasks[client].train
            if task.index == 0:
                held = own[torch.arange(len(own))]["x"]
                drawn = state["buffer"]["x"][: min(10, state["seen"])]
                distances = torch.cdist(drawn, held).min(1).values
                assert float(distances.max()) < 1e-5
                first[client] = state["rng"]
        assert sorted(engine.site.private) == [0, 1, 2, 3]
    assert not torch.equal(first[0], first[1])


def test_ewc_sums_the_clients_fisher_information():
    stream = make_stream(tasks=1)
    learner = make_learner(stream)
    together = EWC(samples=1000, fisher="empirical")
    end_task(learner, together, split(stream[0], 4), stream[0])
    alone = EWC(samples=1000, fisher="empirical")
    learner.begin(stream[0], alone)
    alone.consolidate(learner, stream[0], alone.collect(learner, stream[0]))
    for name, F in alone.information.items():
        torch.testing.assert_close(together.information[name], F, atol=1e-7, rtol=1e-4)
