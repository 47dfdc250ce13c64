"""FOT's invariants: the subspace, and the server's step outside of it."""

import functools

import pytest
import torch
from federations import SKETCHES, end_task, learn, split, total, whole
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adam, AdamW
from toys import DIM, make_learner, make_stream, mlp, weights

from cl_bench.contracts import Protect
from cl_bench.data import MemoryData
from cl_bench.federation import client_fit, server_step
from cl_bench.federation.client import Turn, client_weights, load_weights
from cl_bench.federation.server import ServerOptimizerState
from cl_bench.strategies.federated.fedavg import FedAvg
from cl_bench.strategies.federated.fot import FOT
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.subspace import Moments, ResidualSketch, grow, leading_inputs


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
