"""SGP, TRGP, ROGO and Adam-NSCL: what each guarantees, and what they share."""

import copy
import functools
import sys

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lightning import Trainer
from torch import nn
from torch.nn.functional import pad
from torch.optim import SGD, Adam, AdamW
from toys import (
    DIM,
    IMAGE,
    accuracy,
    cnn,
    learn,
    learn_stream,
    make_engine,
    make_learner,
    make_stream,
    mlp,
    weights,
)

from cl_bench.contracts import Plan, Progress, Protect, UsageError
from cl_bench.experiment import (
    AlignmentSettings,
    CheckpointSettings,
    EvalSettings,
    Identity,
    LoopSettings,
    check_pair,
    conduct,
)
from cl_bench.learners import Classifier
from cl_bench.models import AlexNetCL, LeNet, ResNet18Small
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.projection.adam_nscl import AdamNSCL
from cl_bench.strategies.projection.gpm import GPM, layer_gradients
from cl_bench.strategies.projection.rogo import ROGO
from cl_bench.strategies.projection.sgp import SGP, importance_of
from cl_bench.strategies.projection.trgp import TRGP
from cl_bench.subspace import (
    Confinement,
    Moments,
    Projection,
    RelaxedSpaces,
    Rescaling,
    complement_within,
    confinement,
    grow,
    leading_directions,
    linear_maps,
    split_as_published,
    split_by_angle,
)
from cl_bench.tasks.permuted_digits import PermutedDigits
from runs import differences, final_weights

sgd = functools.partial(SGD, lr=0.05)
OPTIMIZERS = {
    "SGD": sgd,
    "momentum": functools.partial(SGD, lr=0.02, momentum=0.9),
    "weight decay": functools.partial(SGD, lr=0.02, momentum=0.9, weight_decay=1e-2),
    "Adam": functools.partial(Adam, lr=0.005),
    "AdamW": functools.partial(AdamW, lr=0.005, weight_decay=0.05),
}
NETWORKS = {
    "mlp": (mlp, (DIM,), 5),
    "mlp with biases": (functools.partial(mlp, bias=True), (DIM,), 5),
    "cnn": (cnn, IMAGE, 12),
}
CNN_THRESHOLD = {"backbone.0": 0.6, "*": 0.9}
"""The first layer's patches fill all dimensions soon."""


def setting(network="mlp", optimizer=sgd, **stream_options):
    make, shape, subspace = NETWORKS[network]
    stream = make_stream(shape=shape, **{"subspace": subspace, **stream_options})
    return stream, make_learner(stream, make(), optimizer)


def threshold(network, other=0.9):
    return CNN_THRESHOLD if network == "cnn" else other


def matrices(learner, protect=None):
    with torch.no_grad():
        return {
            layer.name: layer.matrix(layer.weight, layer.bias).double().clone()
            for layer in learner.layers(protect or Protect())
        }


def leak(change, basis):
    return float((change @ basis.double()).norm()) / max(float(change.norm()), 1e-300)


def assert_orthonormal(basis, tolerance=1e-5):
    gap = basis.t() @ basis - torch.eye(basis.shape[1], dtype=basis.dtype)
    assert float(gap.abs().max() if gap.numel() else 0) < tolerance


def orthonormal(d, k, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, d, generator=rng, dtype=torch.float64))[0][:, :k]


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return all(torch.equal(a[name], b[name]) for name in a)


# -- an effective weight W + W B (S - I) B^T -------------------------------------------------------

LAYERS = {
    "linear": (lambda: nn.Linear(7, 5, bias=False), (4, 7)),
    "linear with bias": (lambda: nn.Linear(7, 5), (4, 7)),
    "linear on tokens": (lambda: nn.Linear(7, 5), (4, 3, 7)),
    "conv": (lambda: nn.Conv2d(3, 6, 3, stride=2, padding=1), (2, 3, 8, 8)),
    "conv without bias": (lambda: nn.Conv2d(3, 6, 2, bias=False), (2, 3, 5, 5)),
    "grouped conv": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2), (2, 4, 9, 9)),
    "circular conv": (
        lambda: nn.Conv2d(2, 4, 3, padding="same", padding_mode="circular"),
        (2, 2, 6, 6),
    ),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=2), (2, 3, 9)),
}


def rescaled(kind, terms=1, live=False):
    make, shape = LAYERS[kind]
    torch.manual_seed(3)
    module = make().double()
    maps = linear_maps("l", module, augment=True)
    rescaling = Rescaling(maps)
    for i, layer in enumerate(maps):
        for j in range(terms):
            q = 2 + i + j
            rescaling.add(layer.name, orthonormal(layer.in_features, q, i + 5 * j), live=live)
    rescaling.attach()
    return module, maps, rescaling, torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("kind", LAYERS)
def test_identity_changes_no_bit(kind):
    module, _, rescaling, x = rescaled(kind)
    out = module(x)
    rescaling.release()
    assert torch.equal(out, module(x))
    assert type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d)
    assert "scalings" not in module.__dict__


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("kind", LAYERS)
def test_output_and_gradients_are_those_of_the_dense_weight(kind, terms, live):
    module, maps, rescaling, x = rescaled(kind, terms, live)
    with torch.no_grad():
        for parameter in rescaling.parameters():
            parameter.normal_()
    dense = copy.deepcopy(module)
    module(x).square().sum().backward()

    # The authors' way: one dense d x d matrix a layer.
    weight, bias = module.weight.detach().clone().requires_grad_(), module.bias
    bias = None if bias is None else bias.detach().clone().requires_grad_()
    changes = [p.detach().clone().requires_grad_() for p in rescaling.parameters()]
    rows, columns = [], []
    remaining = iter(changes)
    for layer in maps:
        W = layer.matrix(weight, bias)
        scaled = W
        for term in rescaling.terms[layer.name]:
            B, S = term.basis, next(remaining) + torch.eye(term.basis.shape[1]).double()
            constant = W if live else W.detach()
            scaled = scaled + constant @ (B @ S @ B.t() - B @ B.t())
        columns.append(scaled[:, -1] if layer.augmented else None)
        rows.append(scaled[:, : layer.in_features - layer.augmented])
    parameters = {"weight": torch.cat(rows).reshape(weight.shape)}
    if bias is not None:
        parameters["bias"] = torch.cat(columns)
    rescaling.release()
    out = torch.func.functional_call(module, parameters, (x,))
    out.square().sum().backward()
    torch.testing.assert_close(dense(x), out)
    torch.testing.assert_close(module.weight.grad, weight.grad)
    for mine, theirs in zip(rescaling.parameters(), changes, strict=True):
        assert float(theirs.grad.norm()) > 1e-3
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_a_copy_of_a_rescaled_layer_stands_on_its_own():
    module, _, rescaling, x = rescaled("linear")
    twin = copy.deepcopy(module)
    expected = twin(x)
    for parameter in [*rescaling.parameters(), module.weight]:
        parameter.data.normal_()
    assert torch.equal(twin(x), expected)
    assert not torch.equal(module(x), expected)


@pytest.mark.usefixtures("always_inputs")
@pytest.mark.parametrize("kind", ["linear", "linear with bias"])
def test_it_composes_with_projected_inputs(kind):
    gradients = {}
    for where in ("input", "gradient"):
        module, (layer,), rescaling, x = rescaled(kind)
        rescaling.release()
        M = orthonormal(layer.in_features, 4)
        confined = Confinement([layer], {"l": Projection(M)}, where, {"l": len(x)})
        rescaling.terms = {}
        rescaling.add("l", M[:, :2])
        rescaling.attach()
        for parameter in rescaling.parameters():
            parameter.data.copy_(torch.arange(4.0).reshape(2, 2))
        module(x).square().sum().backward()
        confined.constrain()
        gradients[where] = [p.grad for p in (module.weight, *rescaling.parameters())]
        rescaling.release()
        confined.release()
        assert type(module) is nn.Linear
    torch.testing.assert_close(gradients["input"], gradients["gradient"])
    assert all(float(g.norm()) > 1e-3 for g in gradients["input"])


# -- relaxed spaces: the same, held by the weight itself -------------------------------------------


def relaxed_layer(kind, frozen=0, carried=False):
    """A layer whose maps have two relaxed directions, then two more, turned after each.

    These are the first of ``frozen`` directions that are taken out of its gradient.
    """
    make, shape = LAYERS[kind]
    torch.manual_seed(3)
    module = make().double()
    maps = linear_maps("l", module, augment=True)
    original = [layer.matrix(module.weight, module.bias).detach().clone() for layer in maps]
    bases = {m.name: orthonormal(m.in_features, max(4, frozen), i) for i, m in enumerate(maps)}
    relaxed = RelaxedSpaces(maps, bases if frozen else None, carried)
    for start in (0, 2):
        for name, M in bases.items():
            relaxed.grow(name, M[:, start : start + 2])
        for parameter in relaxed.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
        for space in relaxed.spaces.values():
            space.follow()
    return module, maps, original, relaxed, torch.randn(*shape, dtype=torch.float64)


def test_a_weight_in_another_memory_format_follows_too():
    torch.manual_seed(3)
    module = nn.Conv2d(3, 4, 2, bias=False).double().to(memory_format=torch.channels_last)
    (layer,) = linear_maps("l", module)
    W, B = layer.whole().clone(), orthonormal(layer.in_features, 2)
    relaxed = RelaxedSpaces([layer])
    relaxed.grow("l", B)
    (change,) = relaxed.parameters()
    change.data.normal_()
    relaxed.follow()
    torch.testing.assert_close(layer.whole() - W, W @ B @ change.detach() @ B.t())


@pytest.mark.parametrize("kind", LAYERS)
def test_the_weight_is_where_the_small_matrix_says(kind):
    module, maps, original, relaxed, _ = relaxed_layer(kind)
    for i, (layer, W) in enumerate(zip(maps, original, strict=True)):
        space, B = relaxed.spaces[layer.name], orthonormal(layer.in_features, 4, i)
        torch.testing.assert_close(space.basis, B)
        torch.testing.assert_close(space.image, W @ B)
        assert float(space.change.detach().norm()) > 0.3
        moved = layer.matrix(module.weight, module.bias).detach() - W
        torch.testing.assert_close(moved, W @ B @ space.change.detach() @ B.t())


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("frozen", [0, 5, 7])
@pytest.mark.parametrize("carried", [False, True])
def test_the_small_matrix_gets_the_gradient_of_the_chain_rule(kind, frozen, carried):
    module, maps, original, relaxed, x = relaxed_layer(kind, frozen, carried)
    module(x).square().sum().backward()
    raw = [layer.matrix(module.weight.grad, bias_gradient(module)).clone() for layer in maps]
    relaxed.take(strength=0.7)

    changes = [p.detach().clone().requires_grad_() for p in relaxed.parameters()]
    rows, last = [], []
    for layer, W, change in zip(maps, original, changes, strict=True):
        B = relaxed.spaces[layer.name].basis
        effective = W + W @ B @ change @ B.t()
        last.append(effective[:, -1] if layer.augmented else None)
        rows.append(effective[:, : layer.in_features - layer.augmented])
    parameters = {"weight": torch.cat(rows).reshape(module.weight.shape)}
    if module.bias is not None:
        parameters["bias"] = torch.cat(last)
    loss = torch.func.functional_call(module, parameters, (x,)).square().sum()
    (loss + 0.7 * sum(change.square().sum() for change in changes)).backward()

    for layer, mine, theirs, G in zip(maps, relaxed.parameters(), changes, raw, strict=True):
        assert float(theirs.grad.norm()) > 1e-3
        torch.testing.assert_close(mine.grad, theirs.grad)
        space = relaxed.spaces[layer.name]
        B, M = space.basis, relaxed.frozen.get(layer.name, space.basis)
        left = layer.matrix(module.weight.grad, bias_gradient(module))
        moves = space.image @ mine.grad @ B.t() if carried else 0
        torch.testing.assert_close(left, G - G @ M @ M.t() + moves)


def bias_gradient(module):
    return None if module.bias is None else module.bias.grad


def test_a_layer_without_a_gradient_turns_nothing():
    module, _, _, relaxed, _ = relaxed_layer("linear")
    before = module.weight.detach().clone()
    relaxed.take(strength=1.0)
    assert all(p.grad is None for p in relaxed.parameters())
    relaxed.follow()
    assert torch.equal(module.weight, before)


@given(st.integers(1, 8), st.data())
def test_what_a_subspace_holds_beside_a_part_of_it(d, data):
    k = data.draw(st.integers(0, d))
    q = data.draw(st.integers(0, k))
    M = orthonormal(d, k, data.draw(st.integers(0, 99)))
    B = M @ orthonormal(k, q, 1)
    rest = complement_within(M, B)
    assert rest.shape == (d, k - q)
    assert_orthonormal(rest, 1e-10)
    torch.testing.assert_close(M @ M.t(), B @ B.t() + rest @ rest.t(), atol=1e-10, rtol=0)


# -- splitting a frozen space by principal angles --------------------------------------------------


def greedy(frozen, U, cosine):
    """Take the unit vector of span(F) closest to span(U) while it is close enough."""
    close = []
    while frozen.shape[1]:
        values, vectors = torch.linalg.eigh(frozen.t() @ U @ U.t() @ frozen)
        u = frozen @ vectors[:, -1]
        if float(values[-1].clamp_min(0).sqrt()) < cosine:
            break
        close.append(u)
        complement = frozen @ vectors[:, :-1]
        frozen = complement
    return torch.stack(close, 1) if close else frozen[:, :0], frozen


@st.composite
def spaces(draw):
    d = draw(st.integers(3, 12))
    k, r = draw(st.integers(1, d)), draw(st.integers(1, d))
    seed = draw(st.integers(0, 10_000))
    rng = torch.Generator().manual_seed(seed)
    U = orthonormal(d, d, seed)[:, :r]
    near = torch.randn(d, k, generator=rng, dtype=torch.float64) * draw(st.floats(0.05, 1.0))
    mixed = near + pad(U, (0, max(0, k - r)))[:, :k]
    return torch.linalg.qr(mixed)[0], U, draw(st.floats(0.3, 0.97))


@settings(max_examples=60)
@given(spaces())
def test_greedy_relaxation_is_the_closed_form(case):
    frozen, U, cosine = case
    cosines = torch.linalg.svdvals(U.t() @ frozen)
    assume(not bool(((cosines - cosine).abs() < 1e-6).any()))
    close, rest = split_by_angle(frozen, U, cosine)
    expected, expected_rest = greedy(frozen, U, cosine)
    assert close.shape == expected.shape
    torch.testing.assert_close(close @ close.t(), expected @ expected.t(), atol=1e-7, rtol=0)
    torch.testing.assert_close(
        rest @ rest.t(), expected_rest @ expected_rest.t(), atol=1e-7, rtol=0
    )
    both = torch.cat([close, rest], 1)
    assert_orthonormal(both, 1e-9)
    torch.testing.assert_close(both @ both.t(), frozen @ frozen.t(), atol=1e-9, rtol=0)
    assert bool(((U.t() @ close).norm(dim=0) >= cosine - 1e-9).all())
    if rest.shape[1]:
        assert float(torch.linalg.matrix_norm(U.t() @ rest, 2)) < cosine


@settings(max_examples=40)
@given(spaces())
def test_the_published_search_is_right_the_first_time(case):
    frozen, U, cosine = case
    cosines = torch.linalg.svdvals(U.t() @ frozen)
    # Where a direction lies in span(U) altogether, their choice of a column to replace is a matter
    # of rounding.
    assume(float(cosines[0]) < 1 - 1e-6)
    assume(not bool(((cosines - cosine).abs() < 1e-6).any()))
    close, rest = split_by_angle(frozen, U, cosine)
    published, left = split_as_published(frozen, U, cosine)
    assert published.shape == close.shape
    assert left.shape == rest.shape
    torch.testing.assert_close(published @ published.t(), close @ close.t(), atol=1e-6, rtol=0)


def test_the_published_search_goes_on_in_a_skewed_basis():
    frozen, U = orthonormal(12, 6, 1), orthonormal(12, 4, 2)
    _, rest = split_by_angle(frozen, U, 0.99)
    _, skewed = split_as_published(frozen, U, 0.99)
    assert_orthonormal(rest)
    gap = skewed.t() @ skewed - torch.eye(6).double()
    assert float(gap.abs().max()) > 1e-2


def test_leading_directions_take_in_the_one_that_crosses():
    rows = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0]))
    for share, count in ((0.5, 1), (0.65, 2), (0.93, 3), (1.0, 3)):
        U = leading_directions(rows, share)
        assert U.shape == (4, count)
        torch.testing.assert_close(U.abs(), torch.eye(4)[:, :count].double())
    assert leading_directions(torch.zeros(3, 4), 0.5).shape == (4, 0)


# -- what all of them keep: W does not move inside the memory --------------------------------------

TASKS = {"sgp": "domain", "trgp": "task", "rogo": "domain", "adam_nscl": "domain"}


def make(name, network="mlp", **options):
    if name == "adam_nscl":
        return AdamNSCL(**{"a": 20.0 if network == "cnn" else 200.0, **options})
    shared = {"threshold": threshold(network), "samples": 40}
    return {"sgp": SGP, "trgp": TRGP, "rogo": ROGO}[name](**{**shared, **options})


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["trgp", "adam_nscl"])
def test_no_change_inside_the_memory_and_the_new_task_is_learned(name, network, optimizer):
    stream, learner = setting(network, OPTIMIZERS[optimizer], tasks=2)
    strategy = make(name, network)
    learn(learner, strategy, stream[0], epochs=10)
    for task in stream.tasks[1:]:
        memory = dict(strategy.occupied if name == "adam_nscl" else strategy.memory)
        before, naive = matrices(learner), accuracy(learner, task)
        learn(learner, strategy, task, epochs=25)
        for layer, after in matrices(learner).items():
            change, M = after - before[layer], memory[layer]
            assert_orthonormal(M)
            assert M.shape[1] < M.shape[0]
            assert float(change.norm()) > 1e-3, layer
            assert leak(change, M) < 1e-4, layer
        assert sum(M.shape[1] > 0 for M in memory.values()) >= len(memory) / 2
        assert reached(learner, strategy, task) > naive + 0.15


def reached(learner, strategy, task):
    with strategy.inference(learner, task):
        return accuracy(learner, task)


@pytest.mark.parametrize("optimizer", ["Adam", "AdamW", "weight decay"])
def test_projecting_only_the_gradient_leaks(optimizer):
    stream, learner = setting("mlp", OPTIMIZERS[optimizer])
    strategy = TRGP(threshold=0.8, samples=40, project="gradient")
    learn(learner, strategy, stream[0], epochs=10)
    before, memory = matrices(learner), dict(strategy.memory)
    learn(learner, strategy, stream[1], epochs=10)
    after = matrices(learner)
    assert max(leak(after[n] - before[n], M) for n, M in memory.items()) > 1e-2


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", ["sgp", "trgp", "rogo"])
def test_memories_only_grow(name, network):
    stream, learner = setting(network)
    strategy = make(name, network)
    old = {}
    for task in stream:
        learn(learner, strategy, task, epochs=3)
        for layer, M in strategy.memory.items():
            assert_orthonormal(M)
            if layer in old:
                k = old[layer].shape[1]
                assert torch.equal(M[:, :k], old[layer])
                assert M.shape[1] <= M.shape[0]
        old = dict(strategy.memory)


@pytest.mark.parametrize("name", ["sgp", "trgp", "rogo"])
def test_without_a_memory_they_are_plain_sgd(name):
    finetuned, learner = (setting("mlp", optimizer=sgd, n=30)[1] for _ in range(2))
    stream = make_stream(n=30)
    learn_stream(finetuned, Finetune(), stream, epochs=2)
    strategy = make(name, threshold=1e-9)
    for task in stream:
        learn(learner, strategy, task, epochs=2)
        assert all(M.shape[1] == 0 for M in strategy.memory.values()) or task.index > 0
        strategy.memory = {layer: M[:, :0] for layer, M in strategy.memory.items()}
        if name == "sgp":
            strategy.importance = {layer: v[:0] for layer, v in strategy.importance.items()}
        if name == "trgp":
            strategy.subspaces = {layer: [B[:, :0]] for layer, B in strategy.memory.items()}
    assert same_weights(finetuned, learner)


def test_a_full_memory_leaves_nothing_to_move():
    stream, learner = setting("mlp")
    strategy = TRGP(threshold=1.0, samples=40, rank_rule="energy", trust=1.0)
    learn(learner, strategy, stream[0], epochs=3)
    strategy.memory = {n: torch.eye(len(M)).double() for n, M in strategy.memory.items()}
    before = weights(learner)
    learn(learner, strategy, stream[1], epochs=3)
    after = weights(learner)
    assert all(float((after[n] - before[n]).abs().max()) < 1e-6 for n in before)


# -- SGP -------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8), st.floats(0, 50))
def test_importance_lies_between_0_and_1(values, alpha):
    s = torch.tensor(values, dtype=torch.float64)
    found = importance_of(s, alpha)
    assert bool(((found >= 0) & (found <= 1 + 1e-12)).all())
    if max(values) > 0:
        assert float(found.max()) == pytest.approx(1)
    order = s.argsort()
    assert bool((found[order].diff() >= -1e-12).all())


@pytest.mark.parametrize("network", NETWORKS)
def test_importance_accumulates(network):
    stream, learner = setting(network)
    sgp = make("sgp", network)
    learn(learner, sgp, stream[0], epochs=3)
    first = dict(sgp.importance)
    for name, weight in first.items():
        assert not len(weight) or float(weight.max()) == pytest.approx(1)
        assert bool((weight > 0).all())
        assert len(weight) == sgp.memory[name].shape[1]
    learn(learner, sgp, stream[1], epochs=3)
    for name, weight in sgp.importance.items():
        k = len(first[name])
        assert bool((weight[:k] >= first[name]).all())
        assert bool(((weight > 0) & (weight <= 1)).all())
        assert len(weight) == sgp.memory[name].shape[1]
    row = sgp.metrics()["heads.0"]
    assert 0 < row["importance_min"] <= row["importance_mean"] <= 1


def test_surrogate_singular_values_are_row_norms():
    rng = torch.Generator().manual_seed(0)
    sgp = SGP(threshold=0.9, scale=3.0)
    old, new = (
        torch.randn(8, 30, generator=rng).double() * torch.logspace(0, -2, 8)[:, None].double()
        for _ in range(2)
    )
    feed(sgp, old)
    M, before = sgp.memory["l"], sgp.importance["l"]
    feed(sgp, new.flip(0))
    R = new.flip(0)
    projected = torch.linalg.svd(M @ M.t() @ R, full_matrices=False)
    surrogate = ((M.t() @ projected[0]).square() * projected[1].square()).sum(1).sqrt()
    torch.testing.assert_close(surrogate, (M.t() @ R).norm(dim=1))
    S = torch.linalg.svdvals(R - M @ M.t() @ R)[: len(sgp.importance["l"]) - len(before)]
    s = torch.cat([surrogate, S])
    v = 4 * s / (3 * s + s.max())
    expected = torch.cat([(before + v[: len(before)]).clamp(max=1), v[len(before) :]])
    torch.testing.assert_close(sgp.importance["l"], expected)


def feed(strategy, R):
    moments = Moments(len(R))
    moments.add(R.t())
    strategy.remember("l", moments, strategy.threshold)


@pytest.mark.parametrize("network", NETWORKS)
def test_importance_1_is_gpm_and_0_is_sgd(network):
    stream, learner = setting(network)
    twins = {name: copy.deepcopy(learner) for name in ("gpm", "one", "zero", "sgd")}
    gpm, free = GPM(threshold(network), samples=40), Finetune()
    one, zero = make("sgp", network), make("sgp", network)
    for name, strategy in (("gpm", gpm), ("one", one), ("zero", zero), ("sgd", free)):
        learn(twins[name], strategy, stream[0], epochs=3)
        if name in ("one", "zero"):
            fill = torch.ones_like if name == "one" else torch.zeros_like
            strategy.importance = {n: fill(w) for n, w in strategy.importance.items()}
        learn(twins[name], strategy, stream[1], epochs=3)
    found = {name: weights(twin) for name, twin in twins.items()}
    for name, w in found["gpm"].items():
        torch.testing.assert_close(found["one"][name], w, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found["zero"][name], found["sgd"][name], atol=1e-5, rtol=1e-4)
    assert any(float((found["gpm"][n] - found["sgd"][n]).norm()) > 1e-2 for n in found["gpm"])


@pytest.mark.usefixtures("always_inputs")
@pytest.mark.parametrize("name", ["sgp", "trgp", "rogo"])
@pytest.mark.parametrize("pack", [1, 4])
def test_projecting_inputs_is_projecting_gradients(name, pack):
    learned = {}
    for project in ("input", "gradient"):
        stream = make_stream(tasks=3)
        learner = make_learner(stream, optimizer=sgd, pack=pack)
        strategy = make(name, threshold=0.8, project=project)
        engine = make_engine(learner, strategy, epochs=3, pack=pack)
        for task in stream:
            engine.learn(task, Plan(task.train))
        learned[project] = weights(learner)
    for layer, w in learned["input"].items():
        torch.testing.assert_close(w, learned["gradient"][layer], atol=1e-4, rtol=1e-3)


# -- ROGO ------------------------------------------------------------------------------------------


class Watching(ROGO):
    """Keeps the relaxed spaces beyond the end of the task."""

    def collect(self, learner, task):
        spaces = self.relaxed.spaces
        self.bases = {n: s.basis.double() for n, s in spaces.items()}
        self.changes = {n: s.change.detach().double() for n, s in spaces.items()}
        self.images = {n: s.image.double() for n, s in spaces.items()}
        self.left = dict(self.rest)
        return super().collect(learner, task)


def relaxed(network="mlp", optimizer=sgd, epochs=12, pack=1, **options):
    stream, _ = setting(network)
    learner = make_learner(stream, NETWORKS[network][0](), optimizer, pack=pack)
    options = {
        "threshold": {"backbone.0": 0.6, "*": 0.97} if network == "cnn" else 0.97,
        "cosine": 0.6,
        "strength": 0.02,
        "samples": 40,
        "relax_samples": 40,
        "rate_factor": 1.0,
        **options,
    }
    rogo = Watching(**options)
    engine = make_engine(learner, rogo, epochs=epochs, pack=pack)
    engine.learn(stream[0], Plan(stream[0].train))
    return stream, learner, rogo, engine


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


def moments_of(rows):
    moments = Moments(rows.shape[1])
    moments.add(rows)
    return moments


# -- TRGP ------------------------------------------------------------------------------------------


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


# -- Adam-NSCL -------------------------------------------------------------------------------------


def test_the_null_space_is_that_of_all_inputs_in_any_order():
    stream, learner = setting(tasks=2)
    nscl = AdamNSCL(a=50.0)
    learn(learner, nscl, stream[0], epochs=2)
    first = nscl.covariance["backbone.fc1"].clone()
    x = stream[0].everything["x"].double()
    torch.testing.assert_close(first, x.t() @ x / len(x), atol=1e-5, rtol=1e-5)
    learn(learner, nscl, stream[1], epochs=2)
    both = torch.cat([x, stream[1].everything["x"].double()])
    both = both[torch.randperm(len(both))]
    C = both.t() @ both / len(both)
    torch.testing.assert_close(nscl.covariance["backbone.fc1"], C, atol=1e-5, rtol=1e-5)
    assert nscl.seen["backbone.fc1"] == len(both)
    eigenvalues, V = torch.linalg.eigh(C)
    least = max(float(eigenvalues[0]), float(torch.finfo(torch.float32).eps * eigenvalues.sum()))
    U2 = V[:, eigenvalues <= 50 * least]
    M = nscl.occupied["backbone.fc1"]
    torch.testing.assert_close(M @ M.t() + U2 @ U2.t(), torch.eye(DIM).double(), atol=1e-4, rtol=0)
    assert 0 < U2.shape[1] < DIM


def test_samples_may_be_fewer():
    stream, learner = setting(tasks=1)
    nscl = AdamNSCL(samples=7)
    learn(learner, nscl, stream[0], epochs=1)
    assert nscl.seen["backbone.fc1"] == 7


def test_a_smallest_eigenvalue_below_rounding_is_clamped():
    nscl = AdamNSCL(a=10.0)
    rows = torch.diag(torch.tensor([1.0, 1e-3, 1e-5, 0.0]))
    nscl.consolidate(None, None, {"l": moments_of(rows)})
    M = nscl.occupied["l"]
    torch.testing.assert_close(M @ M.t(), torch.diag(torch.tensor([1.0, 0, 0, 0])).double())


@pytest.mark.parametrize("official", [False, True])
def test_the_step_is_projected_and_scaled_only_when_asked(official):
    stream, learner = setting(optimizer=functools.partial(Adam, lr=0.01))
    nscl = AdamNSCL(a=50.0, official_scale=official)
    learn(learner, nscl, stream[0], epochs=3)
    occupied = dict(nscl.occupied)
    learner.begin(stream[1], nscl)
    optimizer = learner.configure_optimizers()
    free = copy.deepcopy(learner)
    plain = Adam(free.parameters(), lr=0.01)
    batch = stream[1].sample(10, 0)
    before = matrices(learner)
    for network, opt in ((learner, optimizer), (free, plain)):
        opt.zero_grad()
        network.loss(network(batch), batch).backward()
        if network is learner:
            nscl.constrain(network)
        opt.step()
    for name, W in before.items():
        step, raw = matrices(learner)[name] - W, matrices(free)[name] - W
        M = occupied[name]
        d, k = M.shape
        P = torch.eye(d).double() - M @ M.t()
        expected = raw @ P / (float(P.norm()) if official else 1.0)
        assert float(P.norm()) == pytest.approx((d - k) ** 0.5, rel=1e-5)
        torch.testing.assert_close(step, expected, atol=1e-5, rtol=1e-3)
        assert float(step.norm()) > 1e-3
    nscl.release(learner)


def test_every_kind_of_parameter_has_its_rate():
    stream = make_stream("task")
    learner = make_learner(stream, noisy(), functools.partial(Adam, lr=0.1, weight_decay=0.5))
    nscl = AdamNSCL(
        later_rate=0.2, norm_rate=0.3, head_rate=0.4, protect=Protect(norm="free", bias="free")
    )
    for task, rates in ((stream[0], [0.1, 0.3, 0.4]), (stream[1], [0.2, 0.3, 0.4])):
        learner.begin(task, nscl)
        groups = learner.configure_optimizers().param_groups
        assert [g["lr"] for g in groups] == rates
        assert [g["weight_decay"] for g in groups] == [0.5, 0.5, 0.0]
        names = {id(p): n for n, p in learner.named_parameters()}
        assert {names[id(p)] for p in groups[2]["params"]} == {
            n for n in names.values() if n.startswith(f"heads.{task.index}.")
        }
        assert {names[id(p)] for p in groups[1]["params"]} == {
            "backbone.1.weight",
            "backbone.1.bias",
        }
        nscl.release(learner)
        learn(learner, nscl, task, epochs=1)


# -- state, and going on in the middle of a task ---------------------------------------------------


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
    """Dropout and running statistics."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(DIM, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 16)
    )


def conducted(
    directory,
    strategy,
    optimizer,
    *,
    model=mlp,
    pack=1,
    scenario="domain",
    dies_at=-1,
    resume=False,
):
    stream = make_stream(scenario, n=44)
    learner = Mortal(stream, model(), optimizer, 10, 0, pack)
    learner.dies_at = dies_at
    trainer = functools.partial(
        Trainer,
        accelerator="cpu",
        max_epochs=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    made = strategy()
    conduct(
        stream,
        made,
        learner,
        trainer,
        Identity("toy", "strategy", "seed: 0\n", "python -m cl_bench"),
        loop=LoopSettings(0, 10, pack),
        evaluation=EvalSettings(),
        alignment=AlignmentSettings(samples=20, batches=2),
        checkpoint=CheckpointSettings(every_steps=3),
        run_dir=directory,
        resume=resume,
    )
    return learner, made


small = {"samples": 20}
rogo = functools.partial(ROGO, threshold=0.97, cosine=0.5, strength=0.1, **small)
trgp = functools.partial(TRGP, threshold=0.8, trust=0.1, **small)
RESUMED = {
    "sgp": (functools.partial(SGP, threshold=0.8, **small), "SGD", {}),
    "sgp-packed": (functools.partial(SGP, threshold=0.8, **small), "SGD", {"pack": 2}),
    "trgp": (trgp, "momentum", {"scenario": "task"}),
    "trgp-quirks-packed": (
        functools.partial(trgp, official_quirks=True),
        "AdamW",
        {"scenario": "task", "pack": 2},
    ),
    "rogo": (rogo, "SGD", {}),
    "rogo-quirks-packed": (
        functools.partial(rogo, official_quirks=True),
        "Adam",
        {"pack": 2, "model": noisy},
    ),
    "adam_nscl": (
        functools.partial(AdamNSCL, 50.0, official_scale=True),
        "Adam",
        {"model": noisy},
    ),
}


@pytest.mark.parametrize("place", ["as it comes", "inputs"])
@pytest.mark.parametrize("case", RESUMED)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, monkeypatch, case, place):
    monkeypatch.setattr(
        sys.modules["cl_bench.experiment.conduct"], "write_figures", lambda directory: []
    )
    if place == "inputs":
        monkeypatch.setattr(confinement, "WORTHWHILE", 0)
    strategy, optimizer, options = RESUMED[case]
    options |= {"strategy": strategy, "optimizer": OPTIMIZERS[optimizer]}
    learner, made = conducted(tmp_path / "whole", **options)
    if isinstance(made, ROGO):
        assert sum(q for q, _ in made.turned.values()) > 0
    if isinstance(made, TRGP):
        assert any(made.region.values())
    for moment in (0.45, 0.72, 0.9, 0.97):
        directory = tmp_path / f"at-{moment}"
        with pytest.raises(Killed):
            conducted(directory, dies_at=int(moment * learner.batches), **options)
        conducted(directory, resume=True, **options)
        assert differences(tmp_path / "whole", directory) == []
        assert final_weights(tmp_path / "whole") == final_weights(directory)


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


# -- options ---------------------------------------------------------------------------------------

WRONG = {
    "sgp-scale": (lambda: SGP(scale=-1), r"strategy\.scale=-1"),
    "sgp-threshold": (lambda: SGP(threshold=1.5), r"strategy\.threshold=1\.5"),
    "trgp-trust": (lambda: TRGP(trust=1.5), r"strategy\.trust=1\.5"),
    "trgp-regions": (lambda: TRGP(regions=0), r"strategy\.regions=0"),
    "trgp-samples": (lambda: TRGP(trust_samples=0), r"strategy\.trust_samples=0"),
    "rogo-cosine": (lambda: ROGO(cosine=0), r"strategy\.cosine=0"),
    "rogo-gradient": (lambda: ROGO(gradient_threshold=2), r"strategy\.gradient_threshold=2"),
    "rogo-schedule": (lambda: ROGO(schedule="never"), r"strategy\.schedule=never: use epoch or"),
    "rogo-representation": (lambda: ROGO(representation="x"), r"strategy\.representation=x"),
    "rogo-strength": (lambda: ROGO(strength=-1), r"strategy\.strength=-1"),
    "rogo-rounds": (lambda: ROGO(rounds=0), r"strategy\.rounds=0"),
    "rogo-samples": (lambda: ROGO(relax_samples=0), r"strategy\.relax_samples=0"),
    "rogo-rate": (lambda: ROGO(rate_factor=0), r"strategy\.rate_factor=0"),
    "nscl-a": (lambda: AdamNSCL(a=0.5), r"strategy\.a=0\.5"),
    "nscl-samples": (lambda: AdamNSCL(samples=0), r"strategy\.samples=0"),
    "nscl-rate": (lambda: AdamNSCL(head_rate=0), r"strategy\.head_rate=0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_name_the_value(case):
    make_wrong, message = WRONG[case]
    with pytest.raises(UsageError, match=message):
        make_wrong()


def test_thresholds_that_fit_no_layer_are_named_by_their_option():
    stream, learner, rogo, _ = relaxed()
    rogo.cosine = [0.9]
    with pytest.raises(UsageError, match=r"strategy\.cosine=\[0\.9\] has 1 entries, but 3 layers"):
        learner.begin(stream[1], rogo)


# -- the papers' networks --------------------------------------------------------------------------

PAPERS = {
    "alexnet": (functools.partial(AlexNetCL, width=64), 64, 5),
    "lenet": (functools.partial(LeNet, widths=(40, 30)), 30, 4),
    "resnet": (functools.partial(ResNet18Small, nf=4), 128, 20),
    "resnet strided": (functools.partial(ResNet18Small, nf=4, stem_stride=2), 32, 20),
}


@pytest.mark.parametrize("network", PAPERS)
def test_the_papers_networks_give_features(network):
    make_network, width, layers = PAPERS[network]
    model = make_network((3, 32, 32))
    assert model.training
    x = torch.randn(4, 3, 32, 32)
    assert model(x).shape == (4, width)
    assert not any(
        isinstance(m, nn.Conv2d | nn.Linear) and m.bias is not None for m in model.modules()
    )
    found = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(found) == layers
    biased = make_network((3, 32, 32), bias=True)
    assert all(m.bias is not None for m in biased.modules() if isinstance(m, nn.Conv2d | nn.Linear))


def test_the_papers_networks_have_the_papers_sizes():
    sizes = {
        name: [tuple(p.shape) for p in model((3, 32, 32)).parameters() if p.dim() > 1]
        for name, model in {"alexnet": AlexNetCL, "lenet": LeNet}.items()
    }
    assert sizes["alexnet"] == [
        (64, 3, 4, 4),
        (128, 64, 3, 3),
        (256, 128, 2, 2),
        (2048, 1024),
        (2048, 2048),
    ]
    assert sizes["lenet"] == [(20, 3, 5, 5), (50, 20, 5, 5), (800, 3200), (500, 800)]
    assert ResNet18Small((3, 84, 84), stem_stride=2)(torch.randn(2, 3, 84, 84)).shape[1] == 160 * 9


@pytest.mark.parametrize("make_network", [AlexNetCL, ResNet18Small])
def test_the_norm_policy_says_what_evaluation_normalises_with(make_network):
    options = {"width": 32} if make_network is AlexNetCL else {"nf": 4}
    x = torch.randn(6, 3, 32, 32)
    for norm, depends in (("batch_statistics", True), ("running_statistics", False)):
        model = make_network((3, 32, 32), norm=norm, **options).eval()
        with torch.no_grad():
            alone, beside = model(x[:3]), model(x)[:3]
        assert torch.allclose(alone, beside, atol=1e-5) != depends
    with pytest.raises(UsageError, match=r"model\.norm=none"):
        make_network((3, 32, 32), norm="none", **options)


@pytest.mark.parametrize("make_network", [AlexNetCL, LeNet, ResNet18Small])
def test_inputs_that_do_not_fit_are_refused(make_network):
    with pytest.raises(UsageError, match="use model="):
        make_network((64,))


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("network", ["alexnet", "resnet"])
def test_every_strategy_learns_on_the_papers_networks(name, network):
    stream = make_stream("task", tasks=2, n=24, shape=(3, 32, 32), subspace=6)
    model = PAPERS[network][0]((3, 32, 32))
    learner = make_learner(stream, model, functools.partial(SGD, lr=0.02), batch_size=12)
    options = {"threshold": 0.7, "samples": 8} if name != "adam_nscl" else {}
    strategy = make(name, **options)
    engine = make_engine(learner, strategy, epochs=2, batch_size=12)
    before = weights(learner)
    for task in stream:
        layers = engine.learn(task, Plan(task.train))
    assert all("rank" in row for row in layers.values())
    after = weights(learner)
    assert float((after["backbone.conv1.weight"] - before["backbone.conv1.weight"]).norm()) > 0
