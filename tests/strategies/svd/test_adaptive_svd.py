"""Adaptive SVD: splits, what may move under which optimizer, importance, boundaries, resuming."""

import copy
import functools
import itertools
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dying import die, noisy, same
from dying import learn as conducted
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adafactor, Adam, AdamW
from toys import learn, learn_stream, make_engine, make_learner, make_stream, mlp, weights

from cl_bench.contracts import Plan, UsageError
from cl_bench.experiment.weights import read_weights
from cl_bench.learners import NetworkServices
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.svd.adaptive_svd import AdaptiveSVD
from cl_bench.subspace import (
    CoreUpdate,
    CosineSum,
    FactorUpdate,
    LinearMap,
    Restriction,
    Split,
    StepUpdate,
    effective_rank,
    largest_value,
    preserved_rank,
    retention_ratios,
    snapped_rank,
    spectra,
)

pytestmark = pytest.mark.usefixtures("no_pictures")

ROOT = Path(__file__).parents[3]
SHAPES = ((9, 5), (5, 9), (7, 7))
KINDS = ("two_sided", "left", "right", "block")
PARAMETRISATIONS = ("projected_param", "dense_projected", "factored")
OPTIMIZERS = {
    "sgd": functools.partial(SGD, lr=0.05),
    "momentum": functools.partial(SGD, lr=0.02, momentum=0.9, nesterov=True),
    "adam": functools.partial(Adam, lr=1e-2),
    "adamw": functools.partial(AdamW, lr=1e-2, weight_decay=0.1),
    "adafactor": functools.partial(Adafactor, lr=0.3),
}


class Watched(AdaptiveSVD):
    """Keeps the splits of the task that it has just learned."""

    def consolidate(self, learner, task, stats):
        self.seen = dict(self.restricted.splits)
        super().consolidate(learner, task, stats)

    @property
    def changes(self):
        """``(name, split, D)`` of every matrix that was constrained."""
        return [(name, split, self.change[name]) for name, split in self.seen.items()]


class GradientOnly(Watched):
    """Negative control: what autograd hooks do."""

    def after_step(self, learner, batch, out):
        pass


def half(**options):
    return {"schedule": "fixed", "preserve_ratio": 0.5} | options


def make(optimizer="adam", hidden=(24, 24, 8), bias=False):
    """A learner with a tall, a square and a wide matrix."""
    stream = make_stream()
    factory = OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer
    return stream, make_learner(stream, mlp(bias, hidden), factory)


def split_of(W, k, low=True):
    ((_, spectrum),) = spectra([W])
    return spectrum.split(k, low=low)


def touching(split, D):
    """Shares of ||D|| that touch U_h from the left, and V_h from the right."""
    left, right = (split.U_h.t() @ D).norm(), (D @ split.V_h).norm()
    return float(left / D.norm()), float(right / D.norm())


# -- splitting ------------------------------------------------------------------------------------


@given(st.integers(1, 8), st.integers(1, 8), st.data())
def test_a_matrix_is_its_two_parts_and_they_do_not_mix(n, m, data):
    r = min(n, m)
    k = data.draw(st.integers(0, r))
    torch.manual_seed(n * 100 + m)
    W = torch.randn(n, m).double()
    s = split_of(W, k)
    high = (s.U_h * s.values[:k]) @ s.V_h.t()
    low = (s.U_l * s.values[k:]) @ s.V_l.t()
    P_U, P_V = torch.eye(n) - s.U_h @ s.U_h.t(), torch.eye(m) - s.V_h @ s.V_h.t()
    tolerance = 1e-7 * float(W.norm())  # small singular values go through the Gram's square root
    assert torch.allclose(high + P_U @ W @ P_V, W, atol=tolerance)
    assert torch.allclose(high + low, W, atol=tolerance)
    assert (s.U_h.t() @ W @ P_V).norm() <= tolerance
    assert (P_U @ W @ s.V_h).norm() <= tolerance
    for basis in (s.U_h, s.V_h):
        assert torch.allclose(basis.t() @ basis, torch.eye(k).double(), atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_split_is_that_of_a_singular_value_decomposition(shape):
    W = torch.randn(shape).double()
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    for k in (1, 3, 5):
        s = split_of(W, k, low=False)
        assert torch.allclose(s.values, S, atol=1e-10)
        assert torch.allclose(s.U_h @ s.U_h.t(), U[:, :k] @ U[:, :k].t(), atol=1e-9)
        assert torch.allclose(s.V_h @ s.V_h.t(), Vt[:k].t() @ Vt[:k], atol=1e-9)
        assert torch.allclose(W @ s.V_h, s.U_h * s.values[:k], atol=1e-9)
    assert largest_value(W) == pytest.approx(float(S[0]), rel=1e-10)


def test_equal_shapes_are_decomposed_together_and_none_is_mixed_up(monkeypatch):
    matrices = [torch.randn(shape) for shape in (*SHAPES, *SHAPES, (9, 5))]
    one_by_one = {i: s.values for i, s in spectra(matrices)}
    assert sorted(one_by_one) == list(range(len(matrices)))
    for i, W in enumerate(matrices):
        assert torch.allclose(one_by_one[i], torch.linalg.svdvals(W.double()), atol=1e-6)
    monkeypatch.setattr("cl_bench.subspace.spectrum.BATCH_ELEMENTS", 30)
    for i, s in spectra(matrices):
        assert torch.allclose(s.values, one_by_one[i], atol=1e-10)


@pytest.mark.parametrize("W", [torch.zeros(6, 4), torch.ones(4, 6), torch.eye(5)])
def test_matrices_without_full_rank_or_without_gaps_split_too(W):
    s = split_of(W, 3)
    for basis in (s.U_h, s.V_h, s.U_l, s.V_l):
        assert torch.allclose(basis.t() @ basis, torch.eye(basis.shape[1]), atol=1e-6)
    D = torch.randn(W.shape)
    assert max(touching(s, Restriction(s, "two_sided")(D))) < 1e-6


# -- what is admissible ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [0, 2, 5])
def test_core_coordinates_and_projection_are_the_same_orthogonal_projector(kind, shape, k):
    W = torch.randn(shape).double()
    s = split_of(W, k, low=False)
    restriction = Restriction(s, kind)
    G = torch.randn(shape).double()
    P_U, P_V = (torch.eye(len(b)).double() - b @ b.t() for b in (s.U_h, s.V_h))
    expected = {
        "two_sided": P_U @ G @ P_V,
        "left": P_U @ G,
        "right": G @ P_V,
        "block": G - s.U_h @ s.U_h.t() @ G @ s.V_h @ s.V_h.t(),
    }[kind]
    zero = torch.zeros(shape).double()
    assert torch.allclose(restriction(G), expected, atol=1e-10)
    assert restriction.reduce(G).shape == restriction.core
    assert torch.allclose(restriction.expand(restriction.reduce(G), zero), expected, atol=1e-10)
    out = torch.empty(shape).double()
    assert restriction.expand(restriction.reduce(G), W, out=out) is out
    assert torch.allclose(out, W + expected, atol=1e-10)
    # The dimensions of its image.
    each = torch.eye(W.numel()).double().reshape(-1, *shape)
    image = torch.stack([restriction(e).flatten() for e in each])
    assert int(torch.linalg.matrix_rank(image, atol=1e-8)) == restriction.free


def test_a_square_core_has_the_size_of_what_is_free():
    s = split_of(torch.randn(7, 7), 3, low=False)
    assert Restriction(s, "two_sided").core == (4, 4)
    assert Restriction(split_of(torch.randn(9, 5), 3, low=False), "two_sided").core == (9, 2)
    assert Restriction(split_of(torch.randn(5, 9), 3, low=False), "two_sided").core == (2, 9)


# -- under optimizers -----------------------------------------------------------------------------


@pytest.mark.parametrize("parametrisation", PARAMETRISATIONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_change_touches_what_is_kept(parametrisation, optimizer):
    stream, learner = make(optimizer)
    strategy = Watched(**half(parametrisation=parametrisation, weight_decay=0.1))
    learn(learner, strategy, stream[0])
    start = weights(learner)
    learn(learner, strategy, stream[1], epochs=5)
    assert len(strategy.changes) == 3
    for name, split, D in strategy.changes:
        W = learner.get_parameter(f"{name}.weight").detach()
        assert torch.equal(D, W - start[f"{name}.weight"])
        assert D.norm() > 1e-3 * W.norm()
        assert max(touching(split, D)) < 1e-4
        # The triplets go on to be singular triplets of the new weight.
        k, scale = split.k, 1e-5 * float(W.norm())
        assert torch.allclose(W @ split.V_h, split.U_h * split.values[:k].float(), atol=scale)
        assert torch.allclose(
            split.U_h.t() @ W, (split.V_h * split.values[:k].float()).t(), atol=scale
        )
        # Two-sided changes have no more rank than what is left.
        r = min(W.shape)
        assert int(torch.linalg.matrix_rank(D, rtol=1e-4)) <= r - k


def test_gradients_alone_are_not_enough_under_adam():
    stream, learner = make("adam")
    strategy = GradientOnly(**half(parametrisation="dense_projected"))
    learn(learner, strategy, stream[0])
    learn(learner, strategy, stream[1], epochs=5)
    for _, split, D in strategy.changes:
        assert max(touching(split, D)) > 1e-2


@pytest.mark.parametrize("parametrisation", PARAMETRISATIONS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_clipping_accumulation_and_mixed_precision_keep_it_too(parametrisation, precision):
    stream, learner = make("adamw")
    strategy = Watched(**half(parametrisation=parametrisation))
    engine = make_engine(
        learner,
        strategy,
        accumulate_grad_batches=2,
        gradient_clip_val=0.1,
        precision=precision,
    )
    for task in stream[:2]:
        engine.learn(task, Plan(task.train))
    for _, split, D in strategy.changes:
        assert D.norm() > 1e-3
        assert max(touching(split, D)) < 1e-4


def test_weights_in_half_precision_are_made_from_cores_in_full():
    class Last(Watched):
        def consolidate(self, learner, task, stats):
            super().consolidate(learner, task, stats)
            self.made = {
                n: u.restriction.expand(u.B.detach(), u.start)
                for n, u in self.restricted.updates.items()
            }

    stream, learner = make("adam")
    strategy = Last(**half())
    engine = make_engine(learner, strategy, precision="bf16-true")
    for task in stream[:2]:
        engine.learn(task, Plan(task.train))
    assert len(strategy.made) == 3
    for name, made in strategy.made.items():
        weight = learner.get_parameter(f"{name}.weight").detach()
        assert weight.dtype == torch.bfloat16
        assert made.dtype == torch.float32
        assert torch.equal(weight, made.bfloat16())
    strategy = AdaptiveSVD(**half(parametrisation="dense_projected", start_task=0))
    with pytest.raises(UsageError, match=r"strategy.parametrisation=projected_param"):
        opened(learner, strategy, stream[2])


@pytest.mark.parametrize("parametrisation", PARAMETRISATIONS)
def test_packs_of_batches_learn_the_same(parametrisation):
    found = []
    for pack in (1, 2):
        stream = make_stream()
        learner = make_learner(stream, mlp(), OPTIMIZERS["adam"], pack=pack)
        engine = make_engine(
            learner, AdaptiveSVD(**half(parametrisation=parametrisation)), pack=pack
        )
        for task in stream[:2]:
            engine.learn(task, Plan(task.train))
        found.append(weights(learner))
    for name, weight in found[0].items():
        assert torch.allclose(weight, found[1][name], atol=1e-6)


def opened(learner, strategy, task):
    """The task's optimizer, before its first step."""
    learner.begin(task, strategy)
    return learner.configure_optimizers()


def test_scaled_losses_are_unscaled_before_they_reach_the_core():
    cores = []
    for scale in (None, 1024.0):
        stream, learner = make("sgd")
        strategy = AdaptiveSVD(**half(start_task=0))
        optimizer = opened(learner, strategy, stream[0])
        loss = learner.training_step(stream[0].everything, 0)
        if scale is None:
            loss.backward()
            strategy.constrain(learner)
        else:
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            strategy.constrain(learner)
            scaler.step(optimizer)
            assert float(scaler.get_scale()) == scale
        cores.append({name: u.B.grad.clone() for name, u in strategy.restricted.updates.items()})
    for name, core in cores[0].items():
        assert torch.allclose(core, cores[1][name], rtol=1e-4, atol=1e-8)


def test_accumulated_gradients_are_mapped_and_weights_made_once_a_step(monkeypatch):
    calls = []
    for method in ("pull_back", "push_forward"):
        original = getattr(CoreUpdate, method)
        monkeypatch.setattr(
            CoreUpdate, method, lambda self, o=original, m=method: (calls.append(m), o(self))
        )
    stream, learner = make("adam")
    engine = make_engine(
        learner, AdaptiveSVD(**half(start_task=0)), epochs=1, accumulate_grad_batches=4
    )
    engine.learn(stream[0], Plan(stream[0].train))  # four batches of ten: one step
    assert calls == ["pull_back"] * 3 + ["push_forward"] * 3


def test_what_goes_into_kept_directions_comes_out_as_before():
    stream, learner = make("adam", bias=True)
    strategy = Watched(**half(train_rest="none"))
    learn(learner, strategy, stream[0])
    before = copy.deepcopy(learner)
    learn(learner, strategy, stream[1])
    for name, split, _ in strategy.changes:
        old, new = before.get_submodule(name), learner.get_submodule(name)
        inside = torch.randn(10, split.k) @ split.V_h.t()
        anything = torch.randn(10, len(split.V_h))
        assert torch.allclose(new(inside), old(inside), atol=1e-4)
        assert torch.allclose(new(anything) @ split.U_h, old(anything) @ split.U_h, atol=1e-4)
        assert not torch.allclose(new(anything), old(anything), atol=1e-3)


@pytest.mark.parametrize("parametrisation", PARAMETRISATIONS)
@pytest.mark.parametrize("kind", ["left", "right", "block"])
def test_the_other_projections_keep_what_they_say_and_no_more(parametrisation, kind):
    if (parametrisation, kind) == ("factored", "block"):
        pytest.skip("refused: see the wrong options")
    stream, learner = make("adam")
    strategy = Watched(**half(parametrisation=parametrisation, projection=kind))
    learn(learner, strategy, stream[0])
    learn(learner, strategy, stream[1])
    for _, split, D in strategy.changes:
        left, right = touching(split, D)
        both = float((split.U_h.t() @ D @ split.V_h).norm() / D.norm())
        assert both < 1e-4
        assert (left < 1e-4) == (kind == "left")
        assert (right < 1e-4) == (kind == "right")
        assert max(left, right) > 1e-2


def test_with_nothing_preserved_it_is_fine_tuning_bit_for_bit():
    found = []
    for strategy in (Finetune(), AdaptiveSVD(schedule="fixed", preserve_ratio=0.0)):
        stream, learner = make("adamw")
        learn_stream(learner, strategy, stream)
        found.append(weights(learner))
    assert all(torch.equal(w, found[1][name]) for name, w in found[0].items())


@pytest.mark.parametrize("parametrisation", PARAMETRISATIONS)
def test_with_everything_preserved_nothing_moves(parametrisation):
    stream, learner = make("adamw")
    strategy = Watched(
        schedule="fixed", preserve_ratio=1.0, start_task=0, parametrisation=parametrisation
    )
    start = weights(learner)
    learn(learner, strategy, stream[0])
    for name, weight in weights(learner).items():
        assert torch.equal(weight, start[name]) == name.startswith("backbone.")


def test_with_nothing_to_train_the_run_does_not_start():
    stream, learner = make("adamw")
    strategy = AdaptiveSVD(schedule="fixed", preserve_ratio=1.0, start_task=0, train_rest="none")
    with pytest.raises(UsageError, match="preserve less"):
        opened(learner, strategy, stream[0])


# -- parametrisations against each other ----------------------------------------------------------


def layer_of(W):
    linear = nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=W.dtype)
    with torch.no_grad():
        linear.weight.copy_(W)
    return LinearMap("layer", linear)


def trajectory(update, layer, optimizer, gradients):
    """The weight after every step with a given dense gradient."""
    stepper = optimizer(update.parameters())
    found = []
    for G in gradients:
        layer.weight.grad = G.clone()
        update.pull_back()
        stepper.step()
        update.push_forward()
        found.append(layer.weight.detach().clone())
    return torch.stack(found)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_core_and_projected_steps_are_the_same_path_under_sgd(shape, kind):
    W = torch.randn(shape).double()
    gradients = torch.randn(6, *shape).double()
    split, sgd = split_of(W, 2), functools.partial(SGD, lr=0.1)
    one, other = layer_of(W), layer_of(W)
    a = trajectory(CoreUpdate(one, Restriction(split, kind), W), one, sgd, gradients)
    b = trajectory(StepUpdate(other, Restriction(split, kind)), other, sgd, gradients)
    assert torch.allclose(a, b, atol=1e-12)
    assert not torch.allclose(a[-1], W)


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_move_as_their_first_order_formula_says(shape):
    W, G = torch.randn(shape).double(), torch.randn(shape).double()
    split, rate = split_of(W, 2), 1e-5
    layer = layer_of(W)
    restriction = Restriction(split, "two_sided")
    (moved,) = trajectory(
        FactorUpdate(layer, restriction, W), layer, functools.partial(SGD, lr=rate), G[None]
    )
    G, s = restriction(G), split.values[2:]
    U, V = split.U_l, split.V_l
    expected = (
        G @ V @ (s**2).diag() @ V.t()
        + U @ (s**2).diag() @ U.t() @ G
        + U @ (U.t() @ G @ V).diagonal().diag() @ V.t()
    )
    assert torch.allclose((moved - W) / -rate, expected, atol=1e-3 * float(expected.norm()))


@pytest.mark.parametrize("shape", SHAPES)
def test_factor_gradients_are_those_of_a_factorised_layer(shape):
    W = torch.randn(shape).double()
    split = split_of(W, 2)
    layer = layer_of(W)
    update = FactorUpdate(layer, Restriction(split, "two_sided"), W)
    factors = [p.detach().clone().requires_grad_() for p in update.parameters()]
    U, s, V = factors
    x, target = torch.randn(4, shape[1]).double(), torch.randn(4, shape[0]).double()
    high = (split.U_h * split.values[:2]) @ split.V_h.t()
    (x @ (high + (U * s) @ V.t()).t() - target).square().sum().backward()
    (layer.module(x) - target).square().sum().backward()
    update.pull_back()
    P_U, P_V = (torch.eye(len(b)).double() - b @ b.t() for b in (split.U_h, split.V_h))
    expected = (P_U @ U.grad, s.grad, P_V @ V.grad)
    for parameter, gradient in zip(update.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-8)


@pytest.mark.parametrize(("optimizer", "same_path"), [("sgd", True), ("adam", False)])
def test_which_basis_of_the_complement_is_taken_matters_to_adam_alone(optimizer, same_path):
    W = torch.randn(9, 5).double()
    split = split_of(W, 2, low=False)
    turn = torch.linalg.qr(torch.randn(3, 3).double())[0]
    turned = Split(split.values, split.U_h, split.V_h, split.U_l, split.V_l @ turn)
    gradients = torch.randn(6, 9, 5).double()
    paths = []
    for s in (split, turned):
        layer = layer_of(W)
        update = CoreUpdate(layer, Restriction(s, "two_sided"), W)
        paths.append(trajectory(update, layer, OPTIMIZERS[optimizer], gradients))
    assert torch.allclose(*paths, atol=1e-10) == same_path


def test_half_precision_weights_have_a_core_in_full_precision():
    layer = LinearMap("layer", nn.Linear(8, 8, bias=False, dtype=torch.bfloat16))
    W = layer.weight.detach().clone()
    ((_, spectrum),) = spectra([W])
    update = CoreUpdate(layer, Restriction(spectrum.split(4), "two_sided"), W)
    assert update.B.dtype == torch.float32
    G = torch.randn(8, 8, dtype=torch.bfloat16)
    # A step this small is nothing in bfloat16, but a thousand of them are something.
    path = trajectory(update, layer, functools.partial(SGD, lr=1e-5), G.expand(1000, 8, 8))
    assert torch.equal(path[0], W)
    assert not torch.equal(path[-1], W)
    with pytest.raises(ValueError, match="bfloat16"):
        StepUpdate(layer, Restriction(spectrum.split(4), "two_sided"))


# -- how much to preserve -------------------------------------------------------------------------


def test_importance_is_the_cosine_of_inputs_and_outputs():
    x = torch.randn(50, 6)
    for W, expected in ((torch.eye(6), 1.0), (-torch.eye(6), -1.0)):
        cosines = CosineSum(W)
        cosines.add(x)
        assert cosines.mean == pytest.approx(expected, abs=1e-6)
    # Rectangular: both are cut to their first coordinates.
    W = torch.randn(7, 6)
    wide, tall = CosineSum(torch.eye(4, 6)), CosineSum(torch.eye(6, 4))
    wide.add(x)
    tall.add(x[:, :4])
    assert wide.mean == pytest.approx(1.0, abs=1e-6)
    assert tall.mean == pytest.approx(1.0, abs=1e-6)
    parts = [CosineSum(W), CosineSum(W), CosineSum(W)]
    parts[0].add(x[:20])
    parts[1].add(x[20:])
    parts[2].add(x)
    assert (parts[0] + parts[1]).mean == pytest.approx(parts[2].mean, abs=1e-12)
    assert math.isnan(CosineSum(W).mean)


@given(st.lists(st.floats(0.01, 10.0), min_size=1, max_size=8), st.floats(0, 1), st.floats(0, 1))
def test_ratios_grow_with_importance_and_stay_shares(values, a, b):
    mrr, trr = sorted((a, b))
    importance = {str(i): v for i, v in enumerate(values)}
    ratios = retention_ratios(importance, mrr, trr)
    ordered = sorted(importance, key=importance.__getitem__)
    for lower, higher in itertools.pairwise(ordered):
        assert ratios[lower] <= ratios[higher] + 1e-12
    assert all(mrr - 1e-12 <= ratio <= 1.0 for ratio in ratios.values())
    mean = sum(values) / len(values)
    if max(values) * (trr - mrr) <= mean * (1 - mrr):  # nobody is cut, importances average 1
        assert sum(ratios.values()) / len(ratios) == pytest.approx(trr)


def test_ratios_are_clamped_and_a_mean_that_is_not_positive_is_an_error():
    ratios = retention_ratios({"a": -1.0, "b": 0.5, "c": 30.0}, 0.1, 0.8)
    assert (ratios["a"], ratios["c"]) == (pytest.approx(0.1), pytest.approx(1.0))
    for importance in ({"a": -1.0, "b": 1.0}, {"a": math.nan, "b": 1.0}):
        with pytest.raises(ValueError, match="mean"):
            retention_ratios(importance, 0.1, 0.8)


def test_ranks():
    assert [preserved_rank(x, 100) for x in (0.0, 0.29, 0.5, 0.999, 1.0)] == [0, 29, 50, 99, 100]
    assert preserved_rank(0.5, 7) == 3
    assert effective_rank(torch.ones(6)) == 6
    assert effective_rank(torch.tensor([5.0, 0.0, 0.0])) == 1
    assert effective_rank(torch.zeros(3)) == 0
    s = torch.tensor([10.0, 9.0, 8.0, 2.0, 1.9, 1.8, 1.7, 1.6, 1.5, 1.4])
    assert snapped_rank(5, s, 0.0) == 5
    assert snapped_rank(5, s, 0.1) == 6  # gaps at 4, 5 and 6: 0.050, 0.053, 0.056
    assert snapped_rank(5, s, 0.2) == 3
    assert [snapped_rank(k, s, 1.0) for k in (0, 10)] == [0, 10]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"schedule": "fixed", "preserve_ratio": 0.25}, [0, 6, 6]),
        ({"schedule": "budget", "tasks": 4}, [0, 6, 12]),
    ],
)
def test_schedules_give_the_ranks_they_say(options, expected):
    stream, learner = make()
    strategy = AdaptiveSVD(**options)
    found = []
    for task in stream:
        learn(learner, strategy, task, epochs=1)
        found.append(strategy.metrics().get("backbone.fc2", {}).get("rank", 0))
    assert found == expected


def test_the_schedule_by_effective_rank():
    stream, learner = make()
    strategy = AdaptiveSVD(schedule="effrank")
    learn(learner, strategy, stream[0])
    expected = effective_rank(torch.linalg.svdvals(learner.backbone.fc2.weight.detach().double()))
    learn(learner, strategy, stream[1], epochs=1)
    assert strategy.metrics()["backbone.fc2"]["rank"] == expected
    assert 0 < expected < 24


def identities():
    """Layers of known importance on non-negative inputs: 1, about 1, and -1."""
    model = mlp(hidden=(12, 12, 12))
    with torch.no_grad():
        for layer in (model.fc1, model.fc2, model.fc3):
            layer.weight.copy_(torch.eye(12))
        model.fc3.weight.neg_()
    return model


def test_importance_is_measured_with_the_previous_tasks_data_and_weights():
    stream = make_stream()
    learner = make_learner(stream, identities(), functools.partial(SGD, lr=0.0))
    strategy = AdaptiveSVD("importance", mrr=0.2, trr=0.6)
    learn(learner, strategy, stream[0])
    assert strategy.importance["backbone.fc1"] == pytest.approx(1.0, abs=1e-6)
    assert strategy.importance["backbone.fc3"] == pytest.approx(-1.0, abs=1e-6)
    learn(learner, strategy, stream[1], epochs=1)
    # The mean of 1, 1 and -1 is 1/3: normalised 3, cut at (1 - 0.2) / 0.4 = 2; and 0.
    ranks = {name: m["rank"] for name, m in strategy.metrics().items()}
    assert ranks == {"backbone.fc1": 12, "backbone.fc2": 12, "backbone.fc3": 2}
    assert strategy.metrics()["backbone.fc3"]["importance"] == pytest.approx(-1.0, abs=1e-6)


def test_importances_that_cannot_be_normalised_are_said():
    stream = make_stream()
    model = identities()
    with torch.no_grad():
        model.fc2.weight.neg_()
        model.fc1.weight.neg_()
    learner = make_learner(stream, model, functools.partial(SGD, lr=0.0))
    strategy = AdaptiveSVD("importance", start_task=0)
    with pytest.raises(UsageError, match=r"strategy.schedule=importance.*strategy.schedule=fixed"):
        learn(learner, strategy, stream[0])


# -- from task to task ----------------------------------------------------------------------------


def carries_over(learn_next, trained):
    """Whether the weight that the next task starts from is the trained one."""
    return torch.equal(learn_next, trained)


@pytest.mark.parametrize("parametrisation", PARAMETRISATIONS)
def test_the_next_task_starts_from_what_was_trained(parametrisation):
    stream, learner = make("adam")
    keys = {name: p.shape for name, p in learner.state_dict().items()}
    strategy = AdaptiveSVD(**half(parametrisation=parametrisation))
    learn(learner, strategy, stream[0])
    before = weights(learner)
    learn(learner, strategy, stream[1])
    trained = weights(learner)
    assert not torch.equal(before["backbone.fc1.weight"], trained["backbone.fc1.weight"])
    optimizer = opened(learner, strategy, stream[2])
    for layer in strategy.layers:
        assert carries_over(strategy.start[layer.name], trained[f"{layer.name}.weight"])
        assert carries_over(layer.weight.detach(), trained[f"{layer.name}.weight"])
    assert not optimizer.state
    assert {name: p.shape for name, p in learner.state_dict().items()} == keys
    assert all(type(m) is nn.Linear for m in learner.backbone if hasattr(m, "weight"))


def test_the_documented_task_switch_of_peft_is_seen_to_discard_the_training():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    start = model[0].weight.detach().clone()
    config = peft.OSFConfig(target_modules=["0"], effective_rank=4)

    def trained():
        wrapped = peft.get_peft_model(copy.deepcopy(model), config)
        optimizer = SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
        wrapped(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()
        probe = torch.eye(8)
        return wrapped, wrapped(probe).detach().t()

    wrapped, weight = trained()
    assert not torch.allclose(weight, start, atol=1e-5)
    unloaded = wrapped.unload()[0].weight.detach()
    assert not torch.allclose(unloaded, weight, atol=1e-5)
    assert torch.allclose(unloaded, start)  # all that was learned is gone
    wrapped, weight = trained()
    assert torch.allclose(wrapped.merge_and_unload()[0].weight.detach(), weight, atol=1e-5)


def test_how_much_of_the_last_update_is_unprotected_and_whether_the_kept_still_lead():
    stream, learner = make("adam")
    strategy = Watched(**half())
    learn(learner, strategy, stream[0])
    learn(learner, strategy, stream[1])
    D = dict(strategy.change)
    W = {layer: learner.get_parameter(f"{layer}.weight").detach().clone() for layer in D}
    learn(learner, strategy, stream[2], epochs=1)
    for name, split, _ in strategy.changes:
        k = split.k
        U, S, Vt = torch.linalg.svd(W[name].double())
        inside = U[:, k:].t() @ D[name].double() @ Vt[k:].t()
        measured = strategy.metrics()[name]
        assert measured["unprotected"] == pytest.approx(
            float(inside.norm() / D[name].norm()), rel=1e-3
        )
        now = learner.get_parameter(f"{name}.weight").detach().double()
        left = now - split.U_h.double() @ (split.U_h.t().double() @ now)
        expected = torch.linalg.svdvals(left)[0] / S[k - 1]
        assert measured["low_over_kept"] == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("rest", ["none", "norms", "all"])
def test_what_else_learns(rest):
    stream = make_stream("task")
    learner = make_learner(stream, noisy(), OPTIMIZERS["adam"])
    strategy = AdaptiveSVD(**half(train_rest=rest))
    learn(learner, strategy, stream[0])
    start = {k: v.clone() for k, v in learner.state_dict().items()}
    learn(learner, strategy, stream[1])
    moved = {k for k, v in learner.state_dict().items() if not torch.equal(v, start[k])}
    matrices = {"backbone.0.weight", "backbone.4.weight", "heads.1.weight"}
    norms = {f"backbone.1.{k}" for k in ("weight", "bias", "running_mean", "running_var")}
    norms |= {"backbone.1.num_batches_tracked"}
    expected = {"none": matrices, "norms": matrices | norms}
    # Under a normalisation a bias has no gradient to speak of; whether rounding moves it is open.
    found = moved - {"backbone.0.bias"} if rest == "all" else moved
    assert found == expected.get(rest, matrices | norms | {"backbone.4.bias"})


def test_convolutions_are_matrices_too():
    from toys import IMAGE, cnn

    stream = make_stream(shape=IMAGE, subspace=None)
    learner = make_learner(stream, cnn(), OPTIMIZERS["adam"])
    strategy = Watched(**half())
    learn(learner, strategy, stream[0])
    learn(learner, strategy, stream[1])
    # All but the grouped one, which belongs to the rest.
    assert sorted(strategy.seen) == ["backbone.0", "backbone.4", "backbone.7"]
    for _, split, D in strategy.changes:
        assert D.norm() > 1e-3
        assert max(touching(split, D)) < 1e-4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schedule": "plateau"}, "strategy.schedule=plateau"),
        ({"projection": "none"}, "strategy.projection=none"),
        ({"parametrisation": "svd"}, "strategy.parametrisation=svd"),
        ({"train_rest": "some"}, "strategy.train_rest=some"),
        ({"parametrisation": "factored", "projection": "block"}, "strategy.projection=block"),
        ({"preserve_ratio": 1.2}, "strategy.preserve_ratio=1.2"),
        ({"snap": -0.1}, "strategy.snap=-0.1"),
        ({"mrr": 0.9, "trr": 0.5}, "strategy.mrr=0.9, strategy.trr=0.5"),
        ({"schedule": "budget"}, "strategy.tasks=null"),
        ({"samples": 0}, "strategy.samples=0"),
    ],
)
def test_wrong_options_are_named(options, words):
    with pytest.raises(UsageError, match=words):
        AdaptiveSVD(**options)


# -- language models ------------------------------------------------------------------------------

transformers = pytest.importorskip("transformers")

FAMILIES = {
    "t5": (
        "T5",
        [
            *(f"encoder.block.{b}.layer.0.SelfAttention.{m}" for b in (0, 1) for m in "qkvo"),
            *(
                f"encoder.block.{b}.layer.1.DenseReluDense.{m}"
                for b in (0, 1)
                for m in ("wi", "wo")
            ),
            *(f"decoder.block.{b}.layer.0.SelfAttention.{m}" for b in (0, 1) for m in "qkvo"),
            *(
                f"decoder.block.{b}.layer.2.DenseReluDense.{m}"
                for b in (0, 1)
                for m in ("wi", "wo")
            ),
        ],
    ),
    **{
        family: (
            name,
            [
                f"model.layers.{b}.{m}_proj"
                for b in (0, 1)
                for m in (
                    *(f"self_attn.{x}" for x in "qkvo"),
                    *(f"mlp.{x}" for x in ("gate", "up", "down")),
                )
            ],
        )
        for family, name in (("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"))
    },
    "gpt2": (
        "GPT2",
        [
            f"transformer.h.{b}.{m}"
            for b in (0, 1)
            for m in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        ],
    ),
    "gpt_neox": (
        "GPTNeoX",
        [
            f"gpt_neox.layers.{b}.{m}"
            for b in (0, 1)
            for m in (
                "attention.query_key_value",
                "attention.dense",
                "mlp.dense_h_to_4h",
                "mlp.dense_4h_to_h",
            )
        ],
    ),
}


def language_model(family, tied=False):
    torch.manual_seed(0)
    shared = {"vocab_size": 40, "tie_word_embeddings": tied, "bos_token_id": 0, "eos_token_id": 1}
    wide = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    wide |= {"num_attention_heads": 2, "max_position_embeddings": 32}
    sizes = {
        "t5": {
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 2,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
        "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
        "gpt_neox": wide,
    }.get(family, {**wide, "num_key_value_heads": 2})
    name = FAMILIES[family][0]
    config = getattr(transformers, f"{name}Config")(**shared, **sizes)
    head = {"t5": "ForConditionalGeneration", "gpt2": "LMHeadModel"}.get(family, "ForCausalLM")
    return getattr(transformers, name + head)(config)


class Bare(NetworkServices):
    """A transformers model as strategies see it."""

    batch_size, seed = 4, 0

    def __init__(self, model):
        self.model = model
        self.held_norms = set()

    @property
    def network(self):
        return self.model

    def blocks(self):
        body = self.model.base_model
        if hasattr(body, "encoder"):
            return [*body.encoder.block, *body.decoder.block]
        return list(body.h if hasattr(body, "h") else body.layers)

    def is_guarded_head(self, name, heads):
        return heads != "never" if name in ("lm_head", "embed_out") else None

    def __call__(self, batch, head=None):
        return self.model(**batch).loss

    def loss(self, out, batch):
        return out

    def label_logits(self, out, batch):
        raise NotImplementedError

    parameters = property(lambda self: self.model.parameters)


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_of_a_family_are_attention_and_mlp_and_all_get_gradients(family):
    learner = Bare(language_model(family))
    strategy = AdaptiveSVD(**half(start_task=0))
    expected = FAMILIES[family][1]
    assert sorted(m.name for m in strategy.targets(learner)) == sorted(expected)
    strategy.setup(learner, make_stream()[0])
    groups = strategy.param_groups(learner)
    optimizer = AdamW([g for g in groups if g["params"]], lr=1e-2)
    tokens = torch.randint(2, 40, (4, 8))
    before = {k: v.clone() for k, v in learner.model.state_dict().items()}
    for _ in range(2):
        learner({"input_ids": tokens, "labels": tokens}).backward()
        strategy.constrain(learner)
        for name in expected:
            assert strategy.restricted.updates[name].B.grad.norm() > 0, name
        optimizer.step()
        strategy.after_step(learner, {}, torch.empty(0))
        optimizer.zero_grad()
    after = learner.model.state_dict()
    for layer in strategy.layers:
        name = f"{layer.name}.weight"
        D = layer.matrix(after[name] - before[name], None)
        assert D.norm() > 0
        assert max(touching(strategy.restricted.splits[layer.name], D)) < 1e-3
    # Nothing of it is in the network: the state loads in the vanilla class and says the same.
    vanilla = type(learner.model)(learner.model.config)
    vanilla.load_state_dict(after)
    for model in (vanilla, learner.model):
        model.eval()
    given_tokens = {"input_ids": tokens, "labels": tokens}
    with torch.no_grad():
        assert torch.equal(vanilla(**given_tokens).logits, learner.model(**given_tokens).logits)


def test_the_released_scripts_would_be_caught():
    """They copy the rebuilt weight under ``no_grad``: no factor is given a gradient."""
    torch.manual_seed(0)
    linear = nn.Linear(6, 6, bias=False)
    split = split_of(linear.weight.detach(), 3)
    U, s, V = (nn.Parameter(t.float().clone()) for t in (split.U_l, split.values[3:], split.V_l))
    high = (split.U_h * split.values[:3].float()) @ split.V_h.t()
    with torch.no_grad():
        linear.weight.copy_(high + (U * s) @ V.t())
    linear(torch.randn(4, 6)).square().sum().backward()
    assert [p.grad for p in (U, s, V)] == [None, None, None]


def test_shared_weights_and_embeddings_are_no_targets():
    learner = Bare(language_model("gpt2", tied=True))
    names = [m.name for m in AdaptiveSVD().targets(learner)]
    assert "lm_head" not in names
    tied = Bare(language_model("gpt2"))
    h = tied.model.transformer.h
    h[1].mlp.c_fc.weight = h[0].mlp.c_fc.weight
    with pytest.raises(UsageError, match=r"'transformer\.h\.1\.mlp\.c_fc' shares its weight"):
        AdaptiveSVD(include=["*h.1*"]).check(tied)
    with pytest.raises(UsageError, match="leave no layer to constrain; there are"):
        AdaptiveSVD(include=["*.q_proj"]).check(learner)


def test_norms_of_transformers_own_classes_are_norms():
    learner = Bare(language_model("t5"))
    strategy = AdaptiveSVD(**half(start_task=0, train_rest="norms"))
    strategy.setup(learner, make_stream()[0])
    free = {n for n, p in learner.model.named_parameters() if p.requires_grad}
    assert {n for n in free if "layer_norm" not in n} == {
        f"{name}.weight" for name in FAMILIES["t5"][1]
    }
    assert {n for n, _ in learner.model.named_parameters() if "layer_norm" in n} <= free


# -- padding, resuming, processes, the command line ------------------------------------------------


def test_padding_does_not_count_towards_importance():
    from biographies import make_causal, world

    learner = make_causal()
    task = world()[0]
    batch = task.sample(8, 0)
    counted = batch["attention_mask"].sum(1)
    longer = {
        "input_ids": nn.functional.pad(batch["input_ids"], (0, 5), value=3),
        "labels": nn.functional.pad(batch["labels"], (0, 5), value=-100),
        "attention_mask": nn.functional.pad(batch["attention_mask"], (0, 5)),
    }
    layers = AdaptiveSVD().targets(learner)
    found = []
    for given_batch in (batch, longer):
        sums = {m.name: CosineSum(m.matrix(m.weight.detach(), None)) for m in layers}
        learner.tap(layers, [given_batch], sums)
        found.append(sums)
    assert found[0][layers[0].name].rows == int(counted.sum())
    for layer in layers:
        assert found[0][layer.name].mean == pytest.approx(found[1][layer.name].mean, abs=1e-6)


def leaning():
    """Layers whose outputs point where their inputs do, on the whole."""
    model = mlp()
    with torch.no_grad():
        for layer in (model.fc1, model.fc2):
            layer.weight.add_(torch.eye(*layer.weight.shape))
    return model


svd = AdaptiveSVD
RUNS = {
    "importance": {
        "strategy": functools.partial(svd, "importance", mrr=0.2, trr=0.6, samples=20),
        "optimizer": OPTIMIZERS["adam"],
        "model": leaning,
    },
    "core": {"strategy": svd, "optimizer": OPTIMIZERS["adamw"]},
    "core-packed": {"strategy": svd, "optimizer": OPTIMIZERS["momentum"], "pack": 2},
    "core-noisy": {
        "strategy": functools.partial(AdaptiveSVD, **half(train_rest="norms", start_task=0)),
        "optimizer": OPTIMIZERS["adam"],
        "model": noisy,
        "accumulate_grad_batches": 2,
        "every": 2,
    },
    "steps": {
        "strategy": functools.partial(svd, parametrisation="dense_projected"),
        "optimizer": OPTIMIZERS["adam"],
    },
    "factors": {
        "strategy": functools.partial(svd, parametrisation="factored"),
        "optimizer": OPTIMIZERS["adam"],
    },
}


@pytest.mark.parametrize("case", RUNS)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, case):
    options = RUNS[case]
    learner, _ = conducted(tmp_path / "whole", **options)
    for moment in (0.45, 0.85):
        directory = tmp_path / str(moment)
        die(directory, dies_at=int(moment * learner.batches), **options)
        conducted(directory, resume=True, **options)
        same(tmp_path / "whole", directory)


def test_the_core_goes_on_in_the_bases_that_it_was_trained_in(tmp_path, monkeypatch):
    """Decomposed anew, on another device perhaps, they could be others."""
    options = RUNS["core"]
    learner, _ = conducted(tmp_path / "whole", **options)
    die(tmp_path / "run", dies_at=int(0.85 * learner.batches), **options)
    monkeypatch.delattr(AdaptiveSVD, "decompose")
    conducted(tmp_path / "run", resume=True, **options)
    same(tmp_path / "whole", tmp_path / "run")


WORKER = """
import sys
import torch
from torch import distributed as dist, nn
from torch.optim import AdamW
from cl_bench.subspace import CoreUpdate, LinearMap, Restriction, spectra

rank, world, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 9, bias=False))
x = torch.randn(8, 6)
if rank == 1:
    original, turn = torch.linalg.eigh, torch.linalg.qr(torch.randn(6, 6).double())[0]
    torch.linalg.eigh = lambda A: (original(A)[0], original(A)[1] @ turn)
layers = [LinearMap(str(i), model[i]) for i in (0, 2)]
starts = [layer.weight.detach().clone() for layer in layers]
updates = [
    CoreUpdate(layers[i], Restriction(s.split(3), "two_sided"), starts[i])
    for i, s in spectra(starts)
]
optimizer = AdamW([u.B for u in updates], lr=1e-2)
for _ in range(5):
    model(x[rank::world]).square().mean().backward()
    for update in updates:
        if world > 1:
            dist.all_reduce(update.layer.weight.grad)
            update.layer.weight.grad /= world
        update.pull_back()
    optimizer.step()
    for update in updates:
        update.push_forward()
torch.save([layer.weight.detach() for layer in layers], out)
"""


def test_processes_of_a_group_share_bases_and_weights(tmp_path, monkeypatch):
    """Two gloo processes, of which the second finds other eigenvectors, against one."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    outs = [tmp_path / f"{i}.pt" for i in range(3)]
    commands = [
        [str(a) for a in (script, rank, world, tmp_path / "store", out)]
        for rank, world, out in zip((0, 1, 0), (2, 2, 1), outs, strict=True)
    ]
    started = [subprocess.Popen([sys.executable, *c], env=environment) for c in commands[:2]]
    monkeypatch.setattr(sys, "argv", commands[2])
    runpy.run_path(str(script))
    for process in started:
        assert process.wait(timeout=300) == 0
    first, second, alone = (torch.load(out) for out in outs)
    for a, b, c in zip(alone, first, second, strict=True):
        assert torch.equal(b, c)
        assert torch.allclose(a, b, atol=1e-5)


def test_from_the_command_line_a_language_model_keeps_its_class(cli, tmp_path):
    status, _, error = cli(
        "+strategy=adaptive_svd",
        "+stream=biography/smoke",
        "strategy.schedule=fixed",
        "stream.pretrain.steps=5",
        "stream.epochs=[1,1]",
        "stream.people=40",
        "stream.new_people=20",
        "eval.dense=[]",
        "probe.recovery.enabled=false",
        "logger.mode=disabled",
        "run_dir=run",
    )
    assert status == 0, error
    lines = (tmp_path / "run" / "layers.csv").read_text()
    assert "capacity_left" in lines
    assert "unprotected" in lines
    saved = read_weights(tmp_path / "run" / "weights" / "task0002.safetensors")
    assert not [name for name in saved if "B" in name.split(".")]
    from transformers import GPTNeoXConfig, GPTNeoXModel

    body = {k.removeprefix("backbone."): v for k, v in saved.items() if k.startswith("backbone.")}
    vocabulary, width = body["embed_in.weight"].shape
    config = GPTNeoXConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
    )
    missing, unexpected = GPTNeoXModel(config).load_state_dict(body, strict=False)
    assert not missing
    assert not unexpected
