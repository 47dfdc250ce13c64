"""Adaptive SVD splits a matrix in two parts; what may move then, under three parametrisations."""

import functools

import pytest
import torch
from cores import OPTIMIZERS, split_of, touching
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD

from cl_bench.subspace import (
    CoreUpdate,
    FactorUpdate,
    LinearMap,
    Restriction,
    Split,
    StepUpdate,
    largest_value,
    spectra,
)

SHAPES = ((9, 5), (5, 9), (7, 7))
KINDS = ("two_sided", "left", "right", "block")


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_factors_learn_leaves_the_split_as_it_was(dtype):
    W = torch.randn(6, 5, dtype=dtype)
    split = split_of(W, 2)
    before = [t.clone() for t in (split.values, split.U_l, split.V_l)]
    update = FactorUpdate(layer_of(W), Restriction(split, "two_sided"), W)
    with torch.no_grad():
        for parameter in update.parameters():
            parameter.add_(1.0)
    after = (split.values, split.U_l, split.V_l)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


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
