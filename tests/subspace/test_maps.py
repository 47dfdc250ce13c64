"""Layers as matrices, and taps on what enters them."""

import sys

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from spaces import case_, projector  # noqa: F401
from torch import nn

from cl_bench.subspace import LinearMap, Moments, dropping, linear_maps, tapped

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


# -- LinearMap -------------------------------------------------------------------------------------


def output_vectors(module, out):
    """The layer's output as (n, o), in the order of ``LinearMap.inputs``."""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return out.flatten(2).transpose(1, 2).reshape(-1, out.shape[1])
    return out.reshape(-1, out.shape[-1])


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("chunk", [1, 1 << 22])
def test_matrix_times_inputs_is_the_layer(case, augment, chunk, monkeypatch):
    monkeypatch.setattr(sys.modules[LinearMap.__module__], "CHUNK_ELEMENTS", chunk)
    module, x = case
    expected = output_vectors(module, module(x))
    for layer in linear_maps("l", module, augment):
        matrix = layer.matrix(layer.weight, layer.bias)
        assert matrix.shape == (layer.out_features, layer.in_features)
        rows = torch.cat(list(layer.inputs(x)))
        found = rows @ matrix.t()
        if layer.bias is not None and not layer.augmented:
            found = found + layer.bias[layer.rows]
        torch.testing.assert_close(found, expected[:, layer.rows], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("augment", [False, True])
def test_store_is_the_inverse_of_matrix(case, augment):
    module, _ = case
    for layer in linear_maps("l", module, augment):
        weight = layer.weight.detach().clone()
        bias = None if layer.bias is None else layer.bias.detach().clone()
        new = torch.randn(layer.out_features, layer.in_features)
        layer.store(new, weight, bias)
        assert torch.equal(layer.matrix(weight, bias), new)
        others = torch.ones(len(weight), dtype=torch.bool)
        if not layer.transposed:
            others[layer.rows] = False
            assert torch.equal(weight[others], layer.weight[others])


def test_matrix_survives_channels_last():
    conv = nn.Conv2d(3, 4, 3)
    (layer,) = linear_maps("l", conv)
    weight = conv.weight.detach().to(memory_format=torch.channels_last)
    matrix = layer.matrix(weight, None)
    assert torch.equal(matrix, conv.weight.detach().flatten(1))
    layer.store(2 * matrix, weight, None)
    assert torch.equal(weight, 2 * conv.weight.detach())


def test_patches_are_those_of_a_triple_loop():
    conv = nn.Conv2d(2, 1, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))
    x = torch.randn(2, 2, 5, 6)
    padded = F.pad(x, (0, 0, 1, 1))
    rows = [
        torch.stack(
            [padded[n, c, 2 * i + a, j + 2 * b] for c in range(2) for a in range(3) for b in (0, 1)]
        )
        for n in range(2)
        for i in range(3)
        for j in range(4)
    ]
    (layer,) = linear_maps("l", conv)
    assert torch.equal(torch.cat(list(layer.inputs(x))), torch.stack(rows))


def test_1x1_convolution_is_a_linear_layer():
    x = torch.randn(7, 5)
    (conv,) = linear_maps("l", nn.Conv2d(5, 4, 1), augment=True)
    (linear,) = linear_maps("l", nn.Linear(5, 4), augment=True)
    (left,) = conv.inputs(x[:, :, None, None])
    (right,) = linear.inputs(x)
    assert torch.equal(left, right)
    assert (conv.out_features, conv.in_features) == (linear.out_features, linear.in_features)


def test_which_modules_are_linear_maps():
    assert [m.name for m in linear_maps("c", nn.Conv2d(4, 4, 3, groups=2))] == ["c#0", "c#1"]
    assert not linear_maps("l", nn.Linear(2, 2, bias=False), augment=True)[0].augmented
    attention = nn.MultiheadAttention(4, 2)
    for module in (nn.ReLU(), nn.BatchNorm1d(3), nn.ConvTranspose2d(2, 2, 3), attention.out_proj):
        assert linear_maps("m", module) == []


# -- taps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", [False, True])
def test_tapped_moments_are_those_of_the_inputs(case, augment):
    module, x = case
    layers = linear_maps("l", module, augment)
    with tapped(layers) as moments:
        module(x)
        module(2 * x)
    for layer in layers:
        rows = torch.cat([*layer.inputs(x), *layer.inputs(2 * x)]).double()
        m = moments[layer.name]
        torch.testing.assert_close(m.gram, rows.t() @ rows, atol=1e-4, rtol=1e-5)
        assert (m.rows, m.samples) == (len(rows), 2 * len(x))
    rows_seen = moments[layers[0].name].rows
    module(x)
    assert moments[layers[0].name].rows == rows_seen


def test_a_limit_takes_the_first_samples_over_batches(case):
    module, x = case
    layers = linear_maps("l", module)
    into = {layer.name: Moments(layer.in_features, limit=len(x) + 1) for layer in layers}
    with tapped(layers, into) as moments:
        for factor in (1, 2, 3):
            module(factor * x)
    for layer in layers:
        rows = torch.cat([*layer.inputs(x), *layer.inputs(2 * x[:1])]).double()
        m = moments[layer.name]
        torch.testing.assert_close(m.gram, rows.t() @ rows, atol=1e-4, rtol=1e-5)
        assert (m.rows, m.samples) == (len(rows), len(x) + 1)


def test_a_limit_counts_samples_however_often_a_layer_is_called():
    linear, x = nn.Linear(4, 4, bias=False), torch.randn(3, 4)
    layers, positions = linear_maps("l", linear), torch.randn(5, 4)
    into = {"l": Moments(4, limit=4)}
    seen = []
    with tapped(layers, into) as moments:
        for factor, first in ((1.0, 3), (2.0, 1), (3.0, 0)):
            moments.begin(3)
            twice = linear(factor * x)
            linear(twice)
            linear(torch.cat([twice, twice], 1).reshape(6, 4))  # two inputs of every sample
            linear(positions)  # of no sample
            seen += [factor * x[:first], twice[:first], twice[:first], twice[:first]]
            seen += [positions] if first else []
    rows = torch.cat(seen).detach().double()
    assert (moments["l"].samples, moments["l"].rows) == (4, len(rows))
    torch.testing.assert_close(moments["l"].gram, rows.t() @ rows, atol=1e-4, rtol=1e-5)


def test_layers_with_one_weight_have_one_accumulator():
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    layers = [LinearMap("a", a), LinearMap("b", b)]
    x, y = torch.randn(3, 4), torch.randn(2, 4)
    with tapped(layers) as moments:
        a(x)
        b(y)
    rows = torch.cat([x, y]).double()
    assert moments["a"] is moments["b"]
    torch.testing.assert_close(moments["a"].gram, rows.t() @ rows)


def test_taps_see_through_attention_and_go_when_a_pass_fails():
    block = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True).eval()
    layers = [m for n, module in block.named_modules() for m in linear_maps(n, module)]
    assert [layer.name for layer in layers] == ["linear1", "linear2"]
    with torch.no_grad(), tapped(layers) as moments:
        block(torch.randn(3, 5, 4))
    assert [m.rows for m in moments.values()] == [15, 15]
    with pytest.raises(AssertionError), tapped(layers):
        block(torch.randn(3, 5, 7))
    assert not block.linear1._forward_pre_hooks


def test_positions_that_do_not_count_are_left_out():
    linear, x = nn.Linear(5, 4), torch.randn(3, 2, 5)
    counted = torch.tensor([[True, True], [True, False], [False, False]])
    with tapped(linear_maps("l", linear)) as moments:
        moments.counted = lambda layer: counted
        linear(x)
        linear(x[:1, 0])  # of another shape: no sequences, every row counts
    rows = torch.cat([x[0], x[1, :1], x[:1, 0]]).double()
    torch.testing.assert_close(moments["l"].gram, rows.t() @ rows)
    assert moments["l"].rows == 4


def test_gradients_lie_in_the_span_of_the_inputs(case):
    module, x = case
    layers = linear_maps("l", module, augment=True)
    x = x[:1]
    with tapped(layers) as moments:
        module(x).square().sum().backward()
    for layer in layers:
        bias = None if layer.bias is None else layer.bias.grad
        gradient = layer.matrix(layer.weight.grad, bias).double()
        _, directions = moments[layer.name].principal()
        outside = gradient - gradient @ projector(directions)
        assert float(outside.norm()) < 1e-5 * float(gradient.norm())


@pytest.mark.parametrize("inplace", [False, True])
def test_with_dropout_on_a_tap_sees_what_enters_a_layers_own_dropout(inplace):
    names = ("fc1", "fc2", "fc3")
    net = nn.Sequential()
    for name in names:
        net.add_module(name, nn.Linear(6, 6))
        net.add_module(f"relu{name}", nn.ReLU())
        net.add_module(f"drop{name}", nn.Dropout(0.5, inplace=inplace))
    net.eval()
    layers = [LinearMap(name, getattr(net, name)) for name in names]
    x = torch.randn(40, 6)
    with torch.no_grad(), tapped(layers) as quiet:
        net(x)
    torch.manual_seed(0)
    with torch.no_grad(), dropping(net), tapped(layers) as dropped:
        net(x)
    torch.manual_seed(0)
    first = F.relu(net.fc1(x))
    second = F.relu(net.fc2(F.dropout(first, 0.5)))
    for name, rows in zip(names, (x, first, second), strict=True):
        torch.testing.assert_close(dropped[name].gram, (rows.t() @ rows).double().detach())
    for name in ("fc1", "fc2"):  # no dropout before these but their own
        torch.testing.assert_close(dropped[name].gram, quiet[name].gram)
    assert (dropped["fc3"].gram - quiet["fc3"].gram).norm() > 0.1 * quiet["fc3"].gram.norm()
    assert not any(m.training or m._forward_hooks for m in net.modules())
    assert all(m.inplace is inplace for m in net.modules() if isinstance(m, nn.Dropout))
