"""Effective weights W + W B (S - I) B^T, and relaxed spaces held by the weight itself."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spaces import assert_orthonormal, orthonormal
from torch import nn

from cl_bench.subspace import (
    Confinement,
    Projection,
    RelaxedSpaces,
    Rescaling,
    complement_within,
    linear_maps,
)

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
