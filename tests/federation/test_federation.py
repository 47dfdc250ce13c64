"""Federations: FOT's invariants, the engine's rounds, partitions, accounting, and resuming."""

import functools
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adam, AdamW
from toys import (
    CLASSES,
    DIM,
    Silent,
    make_learner,
    make_stream,
    mlp,
    weights,
)

from cl_bench.contracts import Plan, Protect, UsageError
from cl_bench.data import MemoryData
from cl_bench.experiment import (
    AlignmentSettings,
    CheckpointSettings,
    EvalSettings,
    Identity,
    LoopSettings,
    check_pair,
    conduct,
)
from cl_bench.federation import (
    FederatedEngine,
    Federation,
    MaskedReducer,
    PlainReducer,
    Upload,
    check_federation,
    client_fit,
    client_statistics,
    partition,
    server_end_task,
    server_step,
    site,
)
from cl_bench.federation.client import Turn, client_weights, load_weights
from cl_bench.federation.fairness import client_forgetting, client_scores
from cl_bench.federation.partition import ClientTask, Part
from cl_bench.federation.server import ServerOptimizerState
from cl_bench.learners import Classifier
from cl_bench.models import MLP
from cl_bench.strategies.federated.fedavg import FedAvg
from cl_bench.strategies.federated.fedprox import FedProx
from cl_bench.strategies.federated.fot import FOT
from cl_bench.strategies.penalty.ewc import EWC
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.strategies.replay.er import ER
from cl_bench.subspace import Moments, ResidualSketch, grow, leading_inputs
from cl_bench.tasks.permuted_digits import PermutedDigits
from cl_bench.tracking import read_results
from runs import differences, final_weights

pytestmark = pytest.mark.usefixtures("no_pictures")

ROOT = Path(__file__).parents[2]
FEDERATION = Federation(clients=5, per_round=3, rounds=3)
SKETCHES = ("gram", "gaussian", "uniform")


def engine_of(learner, strategy, federation=FEDERATION, reducer=None, seed=0):
    return FederatedEngine(
        learner,
        strategy,
        None,
        LoopSettings(seed, learner.batch_size),
        None,
        Silent(),
        Silent(),
        federation=federation,
        reducer=reducer,
    )


def learn(learner, strategy, stream, federation=FEDERATION, reducer=None):
    engine = engine_of(learner, strategy, federation, reducer)
    for task in stream:
        engine.learn(task, Plan(task.train))
        yield task


def whole(task):
    """The task as a client that holds all of it."""
    return ClientTask(task, Part(task.train, torch.arange(len(task.train))))


def split(task, parts):
    rows = torch.tensor_split(torch.randperm(len(task.train)), parts)
    return [ClientTask(task, Part(task.train, r)) for r in rows]


def total(uploads):
    reducer = PlainReducer()
    for k, upload in enumerate(uploads):
        reducer.add(k, upload)
    return reducer.result()


def end_task(learner, strategy, clients, task):
    """GPSE: all clients' statistics, summed, at the weights that the learner has."""
    now = client_weights(learner)
    uploads = [
        client_statistics(learner, strategy, now, client, Turn(0, task.index, 0, k))
        for k, client in enumerate(clients)
    ]
    server_end_task(learner, strategy, now, task, total(uploads).sums)
    return uploads


def a_round(learner, strategy, clients, task, r, server=None, epochs=1):
    """One round of all clients; returns the weights before and after."""
    before = client_weights(learner)
    uploads = [
        client_fit(learner, strategy, before, client, Turn(0, task.index, r, k), epochs)
        for k, client in enumerate(clients)
    ]
    server = server or ServerOptimizerState(None, before)
    load_weights(learner, before)
    after = server_step(learner, strategy, before, total(uploads), server)
    load_weights(learner, after)
    return before, after


def layers_of(learner, strategy):
    names = {id(p): n for n, p in learner.named_parameters()}
    return {
        layer.name: (layer, names[id(layer.weight)]) for layer in learner.layers(strategy.protect)
    }


def double_stream(**options):
    stream = make_stream(**options)
    for task in stream:
        task.data = MemoryData({**task.data.tensors, "x": task.data.tensors["x"].double()})
    return stream


# --- the subspace (invariants 1, 5, 6, 8, 9) ------------------------------------------------------


@pytest.mark.parametrize("sketch", SKETCHES)
@pytest.mark.parametrize("ratio", ["energy", "norm"])
def test_bases_are_orthonormal_and_only_grow(sketch, ratio):
    stream, strategy = make_stream(), FOT(sketch=sketch, residual_ratio=ratio)
    old = {}
    for _ in learn(make_learner(stream), strategy, stream):
        for name, U in strategy.basis.items():
            d, k = U.shape
            assert k <= d
            torch.testing.assert_close(U.t() @ U, torch.eye(k).double(), atol=1e-5, rtol=0)
            if name in old:
                assert torch.equal(U[:, : old[name].shape[1]], old[name])
        old = dict(strategy.basis)
    assert old


def test_sums_are_statistics_of_the_pooled_inputs():
    A = [torch.randn(n, 7).double() for n in (3, 5, 11)]
    U = torch.linalg.qr(torch.randn(7, 2).double())[0]
    R = [a - a @ U @ U.t() for a in A]
    grams, sketches, omegas = [], [], []
    for k, a in enumerate(A):
        gram = ResidualSketch(7, U, "gram")
        gram.add(a)
        grams.append(gram)
        sketch = ResidualSketch(7, U, "gaussian", 9, torch.Generator().manual_seed(k))
        sketch.add(a[:2])
        sketch.add(a[2:])
        sketches.append(sketch)
        rng = torch.Generator().manual_seed(k)
        omegas.append(
            torch.cat([torch.randn(2, 9, generator=rng), torch.randn(len(a) - 2, 9, generator=rng)])
        )
    pooled = torch.cat(R)
    expected = pooled.t() @ torch.cat(omegas).double()
    torch.testing.assert_close(sum(s.statistic for s in sketches), expected, atol=1e-12, rtol=0)
    triangle = (pooled.t() @ pooled)[tuple(torch.tril_indices(7, 7))]
    torch.testing.assert_close(sum(g.statistic for g in grams), triangle, atol=1e-12, rtol=0)
    assert sum(g.residual for g in grams) == pytest.approx(float(pooled.square().sum()))
    assert sum(g.energy for g in grams) == pytest.approx(float(torch.cat(A).square().sum()))


@pytest.mark.parametrize("kind", ["gaussian", "uniform"])
def test_a_wide_sketch_finds_the_exact_directions(kind):
    d, n = 30, 400
    scales = 0.8 ** torch.arange(d).double()
    A = torch.randn(n, d).double() * scales
    exact = Moments(d)
    exact.add(A)
    basis, _ = grow(None, exact, 0.95)
    wanted = basis.shape[1]
    sketch = ResidualSketch(d, None, kind, 20 * d, torch.Generator().manual_seed(0))
    sketch.add(A)
    S2, U = leading_inputs(sketch.statistic, d, kind)
    k = int((S2.cumsum(0) / S2.sum() < 0.95).sum()) + 1
    assert abs(k - wanted) <= 1
    assert float(exact.energy_along(U[:, :k]).sum()) / exact.energy == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("kind", SKETCHES)
def test_a_sketch_finds_no_directions_that_are_not_there(kind):
    q, d = 4, 15
    A = torch.randn(50, q).double() @ torch.randn(q, d).double()
    sketch = ResidualSketch(d, None, kind, d, torch.Generator().manual_seed(0))
    sketch.add(A)
    _, U = leading_inputs(sketch.statistic, d, kind)
    assert U.shape[1] == q
    torch.testing.assert_close(A @ U @ U.t(), A, atol=1e-6, rtol=1e-6)


@settings(max_examples=15)
@given(parts=st.integers(1, 8), seed=st.integers(0, 100))
def test_how_data_are_split_does_not_matter_to_the_gram(parts, seed):
    torch.manual_seed(seed)
    stream = double_stream(tasks=2)
    alone, together = FOT(), FOT()
    learner = make_learner(stream).double()
    for task in stream:
        end_task(learner, alone, [whole(task)], task)
        end_task(learner, together, split(task, parts), task)
    for name, U in alone.basis.items():
        V = together.basis[name]
        torch.testing.assert_close(U @ U.t(), V @ V.t(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("eps", [0.7, 0.9, 0.99])
def test_energy_means_what_eps_says_and_norm_keeps_more(eps):
    stream = double_stream(subspace=None, n=60)
    learner = make_learner(stream).double()
    exact, published = FOT(eps=eps), FOT(eps=eps, residual_ratio="norm")
    for task in stream:
        before = dict(exact.basis)
        published.basis = dict(before)
        end_task(learner, exact, [whole(task)], task)
        end_task(learner, published, [whole(task)], task)
        for name, inputs in learner.tap(learner.layers(exact.protect), [task.everything]).items():
            U, old = exact.basis[name], before.get(name)
            held = float(inputs.energy_along(U).sum()) / inputs.energy
            assert held >= eps - 1e-9
            if U.shape[1] > (0 if old is None else old.shape[1]):
                assert float(inputs.energy_along(U[:, :-1]).sum()) / inputs.energy < eps
            assert published.basis[name].shape[1] >= U.shape[1]


def test_a_task_without_news_adds_nothing_by_energy_and_one_direction_as_published():
    stream = make_stream(tasks=1)
    learner, task = make_learner(stream), stream[0]
    ranks = {}
    for ratio in ("energy", "norm"):
        strategy = FOT(residual_ratio=ratio)
        for _ in range(3):
            end_task(learner, strategy, [whole(task)], task)
            ranks.setdefault(ratio, []).append(strategy.basis["backbone.fc1"].shape[1])
    assert ranks["energy"][0] == ranks["energy"][2]
    assert ranks["norm"][1] > ranks["norm"][0]


# --- the server's step (invariants 2, 3, 4, 7) ----------------------------------------------------

LOCAL = {
    "sgd": functools.partial(SGD, lr=0.1),
    "momentum": functools.partial(SGD, lr=0.05, momentum=0.9),
    "decay": functools.partial(SGD, lr=0.1, weight_decay=0.05),
    "adam": functools.partial(Adam, lr=0.01),
    "adamw": functools.partial(AdamW, lr=0.01, weight_decay=0.1),
}
SERVER = {
    "none": None,
    "momentum": functools.partial(SGD, lr=1.0, momentum=0.9),
    "adam": functools.partial(Adam, lr=0.01),
}


@pytest.mark.parametrize("local", LOCAL)
@pytest.mark.parametrize("server", SERVER)
def test_the_update_is_orthogonal_to_old_inputs(local, server):
    stream = double_stream(tasks=2)
    learner = make_learner(stream, mlp(bias=True), LOCAL[local]).double()
    strategy = FOT(eps=0.9, protect=Protect(bias="augmented"))
    end_task(learner, strategy, split(stream[0], 2), stream[0])
    optimizer = ServerOptimizerState(SERVER[server], client_weights(learner))
    layers = layers_of(learner, strategy)
    for r in range(3):
        before, after = a_round(learner, strategy, split(stream[1], 3), stream[1], r, optimizer)
        for name, (layer, weight) in layers.items():
            bias = weight.replace("weight", "bias")
            change = layer.matrix(
                after[weight] - before[weight],
                after[bias] - before[bias] if layer.augmented else None,
            )
            assert change.norm() > 0
            assert (change @ strategy.basis[name]).norm() <= 1e-5 * change.norm()


def test_without_projection_after_the_server_optimizer_the_update_leaks():
    stream = double_stream(tasks=2)
    learner = make_learner(stream, mlp(), LOCAL["sgd"]).double()
    strategy = FOT(eps=0.9)
    end_task(learner, strategy, [whole(stream[0])], stream[0])
    optimizer = ServerOptimizerState(SERVER["adam"], client_weights(learner))
    before = client_weights(learner)
    upload = client_fit(learner, strategy, before, whole(stream[1]), Turn(0, 1, 0, 0), 1)
    mean = {k.removeprefix("update/"): v for k, v in upload.sums.items() if "update/" in k}
    wrong = optimizer.change(before, strategy.server_update(learner, mean))
    U, change = strategy.basis["backbone.fc1"], wrong["backbone.fc1.weight"]
    assert (change @ U).norm() > 0.01 * change.norm()


def test_old_inputs_are_answered_as_before():
    stream = double_stream(tasks=2)
    learner = make_learner(stream, mlp(), LOCAL["momentum"]).double()
    strategy = FOT()
    end_task(learner, strategy, split(stream[0], 2), stream[0])
    U = strategy.basis["backbone.fc1"]
    inside = torch.randn(9, U.shape[1]).double() @ U.t()
    layer = learner.backbone.fc1
    expected = layer(inside).detach().clone()
    start = layer.weight.detach().clone()
    for r in range(50):
        a_round(learner, strategy, split(stream[1], 2), stream[1], r)
    assert (layer.weight - start).norm() > 0.1
    torch.testing.assert_close(layer(inside), expected, atol=1e-9, rtol=0)


def test_a_full_basis_freezes_its_layer_and_an_empty_one_changes_nothing():
    stream = make_stream(tasks=1)
    learner = make_learner(stream)
    full = FOT()
    full.basis = {"backbone.fc1": torch.eye(DIM).double()}
    before, after = a_round(learner, full, split(stream[0], 2), stream[0], 0)
    assert torch.equal(before["backbone.fc1.weight"], after["backbone.fc1.weight"])
    assert not torch.equal(before["backbone.fc2.weight"], after["backbone.fc2.weight"])
    found = {}
    for strategy in (FOT(), FedAvg()):
        learner = make_learner(stream)
        for _ in learn(learner, strategy, stream):
            found[type(strategy).__name__] = weights(learner)
    for name, value in found["FOT"].items():
        assert torch.equal(value, found["FedAvg"][name])


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [((3, 3), 1, 1), ((3, 2), 2, 1), ((1, 1), 2, 0), ((2, 3), (2, 1), (0, 2))],
)
def test_a_convolution_is_a_linear_layer_on_its_patches(kernel, stride, padding):
    net = nn.Sequential(nn.Conv2d(4, 4, kernel, stride, padding, bias=False), nn.Flatten())
    stream = make_stream(tasks=2, shape=(4, 6, 6), subspace=5, n=12)
    for task in stream:
        task.data = MemoryData({**task.data.tensors, "x": task.data.tensors["x"].double()})
    learner = make_learner(stream, net)
    learner.double()
    strategy = FOT(eps=0.6, protect=Protect(heads="never", bias="free"))
    end_task(learner, strategy, split(stream[0], 3), stream[0])
    U = strategy.basis["backbone.0"]
    patches = (
        torch.nn.functional.unfold(
            stream[0].everything["x"], kernel, padding=padding, stride=stride
        )
        .transpose(1, 2)
        .flatten(0, 1)
    )
    inputs = Moments(patches.shape[1])
    inputs.add(patches)
    V, _ = grow(None, inputs, 0.6)
    torch.testing.assert_close(U @ U.t(), V @ V.t(), atol=1e-6, rtol=0)

    before, after = a_round(learner, strategy, split(stream[1], 2), stream[1], 0)
    change = (after["backbone.0.weight"] - before["backbone.0.weight"]).flatten(1)
    kept = patches @ U @ U.t()  # old patches as far as they are protected
    assert change.norm() > 0
    assert (kept @ change.t()).norm() <= 1e-9 * kept.norm()


def test_one_client_and_one_step_is_gpm():
    stream = double_stream(tasks=2, n=30)
    gpm = GPM(samples=1000, rank_rule="energy", protect=Protect(bias="free"))
    fot = FOT(0.95)
    lr = 0.1
    made = make_learner(stream, mlp(), functools.partial(SGD, lr=lr), batch_size=30).double()
    made.begin(stream[0], gpm)
    gpm.consolidate(made, stream[0], gpm.collect(made, stream[0]))
    gpm.release(made)
    end_task(made, fot, [whole(stream[0])], stream[0])
    for name, M in gpm.memory.items():
        U = fot.basis[name]
        torch.testing.assert_close(U @ U.t(), M @ M.t(), atol=1e-6, rtol=0)

    made.begin(stream[1], Protected := FedAvg())
    gradients = made.gradients(stream[1].everything)
    Protected.release(made)
    before, after = a_round(made, fot, [whole(stream[1])], stream[1], 0)
    for name, (_, weight) in layers_of(made, fot).items():
        M = gpm.memory[name]
        G = gradients[weight]
        step = -lr * (G - G @ M @ M.t())
        torch.testing.assert_close(after[weight] - before[weight], step, atol=1e-6, rtol=0)


def test_several_steps_are_projected_as_one_change():
    stream = double_stream(tasks=2, n=30)
    learner = make_learner(stream, mlp()).double()
    strategy = FOT()
    end_task(learner, strategy, [whole(stream[0])], stream[0])
    before = client_weights(learner)
    upload = client_fit(learner, FedAvg(), before, whole(stream[1]), Turn(0, 1, 0, 0), 3)
    load_weights(learner, before)
    _, after = a_round(learner, strategy, [whole(stream[1])], stream[1], 0, epochs=3)
    for name, (_, weight) in layers_of(learner, strategy).items():
        U, change = strategy.basis[name], upload.sums[f"update/{weight}"]
        expected = change - change @ U @ U.t()
        torch.testing.assert_close(after[weight] - before[weight], expected, atol=1e-9, rtol=0)


# --- what the server may see (invariants 10, 11) --------------------------------------------------


class Sealed(Mapping):
    """An upload that nobody but the reducer may look into."""

    opened = False

    def __init__(self, inside):
        self.inside = inside

    def _look(self):
        assert Sealed.opened, "somebody looked into a single upload"
        return self.inside

    def __getitem__(self, name):
        return self._look()[name]

    def __iter__(self):
        return iter(self._look())

    def __len__(self):
        return len(self._look())


class Vault(PlainReducer):
    def add(self, client, upload):
        Sealed.opened = True
        super().add(client, upload)
        Sealed.opened = False


@pytest.mark.parametrize("extraction", ["global", "local"])
@pytest.mark.parametrize("make", [FOT, EWC])
def test_the_server_sees_only_sums(monkeypatch, make, extraction):
    """The whole run works with a reducer whose uploads raise on any access."""
    seen = []
    for name in ("client_fit", "client_statistics"):
        original = getattr(site, name)

        def sealed(*args, original=original, **kwargs):
            upload = original(*args, **kwargs)
            seen.append(upload.sums)
            return Upload(Sealed(upload.sums), upload.steps, upload.seconds)

        monkeypatch.setattr(site, name, sealed)
    stream = make_stream(n=65)  # 13 samples a client: no width of the network
    strategy = make(extraction=extraction) if make is FOT else make()
    settings = Federation(clients=5, per_round=3, rounds=2, statistics="sampled")
    list(learn(make_learner(stream), strategy, stream, settings, lambda clients, r: Vault()))
    assert len(seen) > 12
    for sums in seen:
        for value in sums.values():
            assert not {13, 65} & set(value.shape)


def test_what_clients_collect_with_dropout_on_can_be_repeated():
    stream = make_stream(tasks=1)
    clients = split(stream[0], 2)

    def collected(dropout):
        torch.manual_seed(0)
        learner = make_learner(stream, MLP(stream.input_shape, (12, 12), dropout=(0.5, 0.5)))
        strategy, now = FOT(dropout=dropout), client_weights(learner)
        uploads = [
            client_statistics(learner, strategy, now, client, Turn(0, 0, 0, k))
            for k, client in enumerate(clients)
        ]
        return total(uploads).sums

    quiet, dropped, again = collected(False), collected(True), collected(True)
    assert all(torch.equal(dropped[name], value) for name, value in again.items())
    changed = {n for n, value in quiet.items() if not torch.allclose(dropped[n], value)}
    layers = {name.partition("/")[2] for name in changed}
    assert layers == {"heads.0"}  # the one layer with a dropout before its own


@pytest.mark.parametrize("sketch", SKETCHES)
def test_which_client_is_which_does_not_matter(sketch):
    stream = make_stream(tasks=2)
    found = []
    for swap in (False, True):
        torch.manual_seed(0)
        learner, strategy = make_learner(stream), FOT(sketch=sketch)
        clients = split(stream[0], 2)
        now = client_weights(learner)
        uploads = [
            client_statistics(learner, strategy, now, client, Turn(0, 0, 0, k))
            for k, client in enumerate(clients)
        ]
        summed = total(uploads[::-1] if swap else uploads)
        server_end_task(learner, strategy, now, stream[0], summed.sums)
        found.append({name: U @ U.t() for name, U in strategy.basis.items()})
    for name, P in found[0].items():
        torch.testing.assert_close(P, found[1][name], atol=1e-4, rtol=0)


def test_masks_cancel_and_a_single_masked_upload_tells_nothing():
    torch.manual_seed(0)
    uploads = [Upload({"a": torch.randn(4000) / 100, "n": torch.tensor(3.0)}) for _ in range(4)]
    masked = MaskedReducer([2, 5, 7, 9], 32, seed=1)
    for client, upload in zip([2, 5, 7, 9], uploads, strict=True):
        masked.add(client, upload)
    result, expected = masked.result().sums, total(uploads).sums
    torch.testing.assert_close(result["a"], expected["a"], atol=4 * 2**-32 + 1e-8, rtol=0)
    assert float(result["n"]) == 12.0
    one = masked.masked(2, uploads[0])["a"]
    plain = uploads[0].sums["a"]
    correlation = torch.corrcoef(torch.stack([one.double(), plain.double()]))[0, 1]
    assert abs(float(correlation)) < 4 / math.sqrt(4000)
    shares = torch.histc(one.double() / 2.0**63, 8, -1, 1) / 4000
    torch.testing.assert_close(shares, torch.full_like(shares, 1 / 8), atol=0.03, rtol=0)


def test_nothing_is_clipped_in_silence():
    reducer = MaskedReducer([0, 1], 40, seed=0)
    with pytest.raises(UsageError, match=r"fraction_bits=40.*'big'.*lower fraction_bits"):
        reducer.add(0, Upload({"big": torch.tensor([1e7])}))
    with pytest.raises(UsageError, match="nan"):
        reducer.add(0, Upload({"wrong": torch.tensor([float("nan")])}))


def test_a_run_with_masks_equals_one_without():
    stream = make_stream(tasks=2)
    found = []
    for secure in ("none", "masked"):
        learner, strategy = make_learner(stream), FOT()
        settings = Federation(clients=4, per_round=3, rounds=3, secure=secure)
        list(learn(learner, strategy, stream, settings))
        found.append((weights(learner), strategy.basis))
    for name, value in found[0][0].items():
        torch.testing.assert_close(value, found[1][0][name], atol=1e-5, rtol=0)
    for name, U in found[0][1].items():
        V = found[1][1][name]
        torch.testing.assert_close(U @ U.t(), V @ V.t(), atol=1e-4, rtol=0)


# --- clients and rounds (invariant 13) ------------------------------------------------------------


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


# --- what is recorded -----------------------------------------------------------------------------


def test_scores_of_clients_follow_their_classes():
    counts = torch.tensor([[10, 0], [5, 5], [0, 0]])
    first = client_scores(counts, torch.tensor([0.9, 0.5]).double())
    assert first[:2].tolist() == pytest.approx([0.9, 0.7])
    assert first[2].isnan()
    now = client_scores(counts, torch.tensor([0.4, 0.5]).double())
    newest = torch.tensor([1.0, 1.0, 1.0]).double()
    lost = client_forgetting({0: first, 1: newest}, {0: now, 1: newest}, last=1)
    assert lost[:2].tolist() == pytest.approx([0.5, 0.25])
    assert lost[2].isnan()


class Killed(BaseException):
    """The process is gone."""


class Mortal(Classifier):
    """Dies before the ``dies_at``-th batch."""

    dies_at = -1
    batches = 0

    def _learn(self, batch):
        if self.batches == self.dies_at:
            raise Killed
        self.batches += 1
        return super()._learn(batch)


def noisy():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(DIM, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 16)
    )


def whole_run(directory, strategy, *, dies_at=-1, resume=False, every=1, **options):
    stream = make_stream(n=60)
    optimizer = functools.partial(SGD, lr=0.05, momentum=0.9)
    learner = Mortal(stream, noisy(), optimizer, 10, 0, 1, True)
    learner.dies_at = dies_at
    settings = {"clients": 6, "per_round": 3, "rounds": 3, "drop_outs": 0.2, **options}
    conduct(
        stream,
        strategy(),
        learner,
        None,
        Identity("toy", "strategy", "seed: 0\n", "python -m cl_bench"),
        loop=LoopSettings(0, 10),
        evaluation=EvalSettings(),
        alignment=AlignmentSettings(samples=20, batches=2),
        checkpoint=CheckpointSettings(True, every, 2),
        run_dir=directory,
        resume=resume,
        engine=functools.partial(FederatedEngine, federation=Federation(**settings)),
    )
    return learner


fot_local = functools.partial(FOT, sketch="gaussian", residual_ratio="norm", extraction="local")
RESUMED = {
    "fot": (FOT, {"server": functools.partial(Adam, lr=0.01)}),
    "fot as published": (fot_local, {"statistics": "sampled"}),
    "ewc": (functools.partial(EWC, samples=10), {"partition": "shards"}),
    "er": (functools.partial(ER, memory=8), {"participation": 0.75}),
}
IGNORE = ("client_seconds", "federation")


@pytest.mark.parametrize("case", RESUMED)
def test_a_run_killed_in_any_round_goes_on_bit_for_bit(tmp_path, case, monkeypatch):
    monkeypatch.setattr(FederatedEngine, "figures", lambda self, directory: [])
    strategy, options = RESUMED[case]
    learner = whole_run(tmp_path / "whole", strategy, **options)
    for dies_at in range(1, learner.batches, 7):
        killed = tmp_path / f"killed-{dies_at}"
        with pytest.raises(Killed):
            whole_run(killed, strategy, dies_at=dies_at, **options)
        whole_run(killed, strategy, resume=True, **options)
        assert differences(tmp_path / "whole", killed, IGNORE) == []
        one, other = final_weights(tmp_path / "whole"), final_weights(killed)
        assert {k: v for k, v in one.items() if "seconds" not in k} == {
            k: v for k, v in other.items() if "seconds" not in k
        }


def test_heads_of_tasks_to_come_are_guarded_before_they_learn():
    """The one head of a class-incremental stream reads the same features, in parts yet unseen."""
    stream = make_stream("class", tasks=2, n=60)
    learner, strategy = make_learner(stream), FOT(eps=0.9)
    tasks = learn(learner, strategy, stream)
    next(tasks)
    bases = {i: strategy.basis[f"heads.{i}"] for i in (0, 1)}
    assert torch.equal(bases[0] @ bases[0].t(), bases[1] @ bases[1].t())
    before = [head.weight.detach().clone() for head in learner.heads]
    next(tasks)
    for i, head in enumerate(learner.heads):
        change = (head.weight - before[i]).detach()
        assert change.norm() > 1e-3
        assert (change @ bases[i].to(change)).norm() < 1e-4 * change.norm()


def test_traffic_is_what_the_shapes_say(tmp_path):
    whole_run(tmp_path / "run", FOT, drop_outs=0.0)
    events = read_results(tmp_path / "run")
    model = 4 * (12 * 16 + 16 + 2 * 16 + 2 * 16 + 16 * 16 + 16 + 16 * 3 + 3)
    rounds = [e for e in events if e["event"] == "round"]
    assert [(e["task"], e["round"]) for e in rounds] == list(itertools.product(range(3), [1, 2, 3]))
    for e in rounds:
        assert e["bytes_down"] == 3 * model
        held = 4 * 2 * 16 if e["task"] else 0  # normalisation is frozen after the first task
        assert e["bytes_up"] == 3 * (model - held + 3 * 8)  # weight, loss and steps beside it
    widths = (13, 17, 17)  # one more each: biases are in the matrix
    layers = {e["task"]: e["layers"] for e in events if e["event"] == "layers"}
    for e in [e for e in events if e["event"] == "federation"]:
        numbers = sum(d * (d + 1) // 2 + 2 for d in widths) + 1
        assert e["statistics_up"] == 6 * 8 * numbers
        before = layers.get(e["task"] - 1, {})
        held = [v["rank"] for v in before.values() if "rank" in v]
        memory = sum(d * k for d, k in zip(widths, held, strict=False))
        assert e["memory_down"] == 6 * 8 * memory
    clients = [e for e in events if e["event"] == "clients"]
    assert [len(e["forgetting"]) for e in clients] == [6, 6, 6]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["federation"]["model_up"] == sum(e["bytes_up"] for e in rounds)
    assert (tmp_path / "run" / "partition.png").stat().st_size > 1000


def test_a_layer_that_fills_up_is_announced(tmp_path, capsys):
    whole_run(tmp_path / "run", functools.partial(FOT, eps=1.0), rounds=1)
    said = capsys.readouterr().out
    assert "warning: layer backbone.0 is full" in said
    assert "lower strategy.eps" in said


# --- behaviour (invariant 15) ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["iid", "shards"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fot_forgets_less_than_half_of_what_fedavg_forgets(seed, kind):
    stream = PermutedDigits(num_tasks=2)
    shape, sgd = stream.input_shape, functools.partial(SGD, lr=0.1)
    federation = Federation(clients=10, per_round=5, rounds=20, partition=kind)
    lost, newest = {}, {}
    for strategy in (FedAvg(), FOT(eps=0.9)):
        torch.manual_seed(seed)
        learner = Classifier(stream, MLP(shape, (100, 100)), sgd, 10, seed)
        engine = engine_of(learner, strategy, federation, seed=seed)
        rows = []
        for task in stream:
            engine.learn(task, Plan(task.train))
            rows.append(engine.evaluate(list(stream), 2000, None))
        name = type(strategy).__name__
        lost[name] = rows[0]["perm_0"] - rows[1]["perm_0"]
        newest[name] = rows[1]["perm_1"]
    assert lost["FedAvg"] > 0.02
    assert lost["FOT"] < lost["FedAvg"] / 2
    assert newest["FOT"] > newest["FedAvg"] - 0.05


def test_the_command_line_runs_a_federation(tmp_path):
    command = [
        *(sys.executable, "-m", "cl_bench", "+strategy=fot", "+stream=permuted_digits"),
        *("+federation=small", "stream.num_tasks=2", "federation.rounds=3"),
        f"run_dir={tmp_path / 'run'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "traffic of all clients" in done.stdout
    events = {event["event"] for event in read_results(tmp_path / "run")}
    assert {"round", "federation", "clients", "layers", "evaluation"} <= events
    assert (tmp_path / "run" / "partition.png").exists()


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clients": 0}, "clients=0"),
        ({"clients": 2, "per_round": 3}, "per_round=3"),
        ({"rounds": [3, 0]}, r"rounds=\[3, 0\]: every entry: at least 1"),
        ({"partition": "sorted"}, "partition=sorted"),
        ({"participation": 0.0}, "participation=0.0"),
        ({"drop_outs": 1.0}, "drop_outs=1.0"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"secure": "yes"}, "secure=yes"),
        ({"fraction_bits": 60}, "fraction_bits=60"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(UsageError, match=message):
        Federation(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 1.5}, "strategy.eps=1.5"),
        ({"sketch": "fourier"}, "strategy.sketch=fourier"),
        ({"width": 0}, "strategy.width=0"),
        ({"residual_ratio": "squared"}, "residual_ratio=squared"),
        ({"extraction": "server"}, "extraction=server"),
        ({"eps_inc": 2}, "eps_inc=2"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(UsageError, match=message):
        FOT(**options)


def test_what_cannot_run_together_is_refused():
    stream = make_stream()
    with pytest.raises(
        UsageError, match=r"'fot' runs in a federation: add one.*\+federation=small"
    ):
        check_pair("fot", FOT(), stream)
    with pytest.raises(UsageError, match=r"'gpm' learns from one site's data.*docs/federation\.md"):
        check_pair("gpm", GPM(), stream, federated=True)
    for name, strategy in (("fedavg", FedAvg()), ("ewc", EWC()), ("er", ER()), ("fot", FOT())):
        check_pair(name, strategy, stream, federated=True)
        check_federation(FEDERATION, name, strategy, stream, {})
    for strategy, federation, trainer, message in (
        (fot_local(), FEDERATION, {}, "add federation.statistics=sampled"),
        (FOT(), Federation(clients=10, rounds=[1, 2]), {}, "federation.rounds"),
        (FOT(), Federation(clients=50), {}, "federation.clients = 50, but task 't0' has 40"),
        (
            FOT(),
            Federation(clients=30, partition="shards"),
            {},
            "federation.shards_per_client = 60, but task 't0' has 40",
        ),
        (FOT(), FEDERATION, {"precision": "bf16-mixed"}, "trainer.precision=bf16-mixed"),
        (FOT(), FEDERATION, {"gradient_clip_val": 1.0}, "trainer.gradient_clip_val=1.0"),
    ):
        with pytest.raises(UsageError, match=message):
            check_federation(federation, "fot", strategy, stream, trainer)


def test_a_diverging_client_ends_the_run():
    stream = make_stream(tasks=1)
    learner = make_learner(stream, optimizer=functools.partial(SGD, lr=1e12))
    with pytest.raises(UsageError, match=r"on client .* lower the learning rate"):
        list(learn(learner, FedAvg(), stream))


@pytest.mark.parametrize("option", ["eval.dense=[0,5]", "probe.updates.enabled=true"])
def test_what_looks_at_steps_is_refused(cli, option):
    status, _, err = cli(
        "+strategy=fedavg", "+stream=permuted_digits", "+federation=small", "pack=1", option,
        "logger.mode=disabled",
    )  # fmt: skip
    assert status != 0
    assert "look at optimizer steps, a federation has rounds" in err
