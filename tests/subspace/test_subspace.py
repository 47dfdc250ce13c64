"""The linear algebra of ``cl_bench/subspace``, against dense matrices and SVDs."""

import copy
import functools
import sys

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from cl_bench.subspace import (
    Confinement,
    LinearMap,
    Moments,
    Projection,
    ahead,
    complement,
    confinement,
    dropping,
    extend,
    linear_maps,
    mark_drawn,
    rank_to_reach,
    tapped,
    unconfined,
)

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

small = settings(max_examples=40)
seeds = st.integers(0, 10_000)


def randn(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def orthonormal(d, k, seed=0):
    return torch.linalg.qr(randn(seed, d, d))[0][:, :k]


def projector(basis):
    return basis @ basis.t()


def assert_orthonormal(basis, tolerance=1e-10):
    torch.testing.assert_close(
        basis.t() @ basis, torch.eye(basis.shape[1]).to(basis), atol=tolerance, rtol=0
    )


def moments_of(*pieces):
    m = Moments(pieces[0].shape[1])
    for piece in pieces:
        m.add(piece)
    return m


def decayed(seed, n, d):
    """Inputs whose singular values fall by a factor each: no near-equal eigenvalues."""
    r = min(n, d)
    left = torch.linalg.qr(randn(seed, n, r))[0]
    right = torch.linalg.qr(randn(seed + 1, d, r))[0]
    return left * 0.7 ** torch.arange(r) @ right.t()


# -- Moments ---------------------------------------------------------------------------------------


@small
@given(seeds, st.integers(1, 12), st.lists(st.integers(0, 9), min_size=1, max_size=4))
def test_moments_add_up(seed, d, sizes):
    pieces = [randn(seed + i, n, d) for i, n in enumerate(sizes)]
    whole = torch.cat(pieces)
    for found in (
        moments_of(*pieces),
        moments_of(whole),
        functools.reduce(lambda a, b: a + b, [moments_of(p) for p in pieces]),
    ):
        torch.testing.assert_close(found.gram, whole.t() @ whole)
        assert found.rows == len(whole)
        assert found.energy == pytest.approx(float(whole.square().sum()))
        assert float(found.gram.trace()) == pytest.approx(found.energy)
        m = orthonormal(d, max(1, d // 2), seed)
        along = (whole @ m).square().sum(0)
        torch.testing.assert_close(found.energy_along(m), along)


def test_moments_count_samples_and_leave_terms_alone():
    a, b = Moments(4), Moments(4)
    a.add(randn(0, 6, 4), samples=2)
    b.add(randn(1, 3, 4), samples=1)
    before = a.gram.clone(), b.gram.clone()
    total = a + b
    total.add(randn(2, 5, 4), samples=5)
    assert (total.rows, total.samples) == (14, 8)
    assert torch.equal(a.gram, before[0])
    assert torch.equal(b.gram, before[1])


@small
@given(seeds, st.integers(1, 14), st.integers(1, 20), st.data())
def test_principal_is_the_svd(seed, d, n, data):
    k = data.draw(st.integers(0, d - 1))
    x = decayed(seed, n, d)
    basis = orthonormal(d, k, seed + 2)
    residual = x - x @ projector(basis)
    _, s, vh = torch.linalg.svd(residual, full_matrices=False)
    kept = s.square() > 1e-12 * x.square().sum()
    assume(not ((s.square() < 1e-10 * x.square().sum()) & kept).any())  # on the edge of rounding
    energies, directions = moments_of(x).principal(outside=basis)
    torch.testing.assert_close(energies, s[kept].square(), atol=1e-12, rtol=1e-5)
    assert (energies.diff() <= 0).all()
    assert_orthonormal(directions, 1e-5)
    torch.testing.assert_close(projector(directions), projector(vh[kept].t()), atol=1e-5, rtol=0)
    assert float((basis.t() @ directions).abs().amax() if k else 0.0) < 1e-5


@small
@given(seeds, st.integers(2, 12), st.data())
def test_kept_inputs_and_gram_agree(seed, d, data):
    n = data.draw(st.integers(1, d - 1))
    k = data.draw(st.integers(0, d - n))
    x, basis = decayed(seed, n, d), orthonormal(d, k, seed + 2)
    kept = moments_of(x)
    gram = moments_of(x, torch.zeros(d, d, dtype=torch.float64))  # d rows of nothing: the Gram
    assert kept._inputs is not None
    assert gram._inputs is None
    torch.testing.assert_close(kept.gram, gram.gram)
    one, other = kept.principal(basis), gram.principal(basis)
    torch.testing.assert_close(one[0], other[0], atol=1e-12, rtol=1e-6)
    torch.testing.assert_close(projector(one[1]), projector(other[1]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("n", [6, 40])
def test_principal_spans_the_same_space_in_float32(n):
    x = decayed(0, n, 20).float()
    _, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    energies, directions = moments_of(x).principal()
    r = int((s.square().cumsum(0) / s.square().sum() < 0.999).sum()) + 1
    torch.testing.assert_close(energies[:r], s[:r].square(), atol=0, rtol=1e-4)
    torch.testing.assert_close(
        projector(directions[:, :r]), projector(vh[:r].t()), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [7, 50])
def test_principal_leaves_rounding_out(n, dtype):
    x = (randn(0, n, 3) @ randn(1, 3, 16)).to(dtype)
    energies, directions = moments_of(x).principal()
    assert energies.shape == (3,)
    assert_orthonormal(directions, 1e-6)
    inside = torch.linalg.qr(randn(1, 3, 16).t())[0]
    again, _ = moments_of(x).principal(outside=inside)
    assert again.numel() == 0


@pytest.mark.parametrize("zeros", [0, 3, 9])
def test_moments_of_nothing(zeros):
    m = Moments(5)
    m.add(torch.zeros(zeros, 5))
    energies, directions = m.principal()
    assert energies.shape == (0,)
    assert directions.shape == (5, 0)
    assert m.energy == 0.0
    assert torch.equal(m.energy_along(orthonormal(5, 2)), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_moments_keep_what_they_saw(dtype):
    x = randn(0, 3, 6).to(dtype)
    expected = x.double().t() @ x.double()
    m = moments_of(x)
    x.zero_()  # a residual connection may write into a layer's input after the layer has read it
    torch.testing.assert_close(m.gram, expected)


# -- bases -----------------------------------------------------------------------------------------


@small
@given(seeds, st.integers(1, 12), st.data())
def test_extend_grows_an_orthonormal_basis(seed, d, data):
    k = data.draw(st.integers(0, d))
    r = data.draw(st.integers(0, d + 2))
    basis, directions = orthonormal(d, k, seed), randn(seed + 1, d, r)
    grown = extend(basis, directions)
    assert grown.shape == (d, min(d, k + r))
    assert torch.equal(grown[:, :k], basis)
    assert_orthonormal(grown)
    whole = torch.cat([basis, directions[:, : d - k]], dim=1)
    torch.testing.assert_close(projector(grown) @ whole, whole, atol=1e-8, rtol=1e-8)
    assert extend(grown, directions[:, :0]) is grown


def test_extend_stays_orthonormal_for_directions_almost_inside():
    basis = orthonormal(10, 4)
    outside = orthonormal(10, 6)[:, 4:]
    grown = extend(basis, basis[:, :2] + 1e-7 * outside)
    assert_orthonormal(grown)
    torch.testing.assert_close(projector(grown) @ outside, outside, atol=1e-6, rtol=0)


@small
@given(seeds, st.integers(1, 12), st.data())
def test_complement(seed, d, data):
    k = data.draw(st.integers(0, d))
    basis = orthonormal(d, k, seed)
    free = complement(basis)
    assert free.shape == (d, d - k)
    assert_orthonormal(free)
    eye = torch.eye(d, dtype=torch.float64)
    torch.testing.assert_close(projector(basis) + projector(free), eye, atol=1e-10, rtol=0)


energy_lists = st.lists(st.integers(1, 1000), min_size=1, max_size=8).map(
    lambda e: torch.tensor(sorted(e, reverse=True), dtype=torch.float64)
)


@small
@given(energy_lists, st.floats(0.01, 1.0), st.floats(0.0, 0.99))
def test_rank_reaches_the_threshold_and_is_minimal(energies, eps, explained):
    total = float(energies.sum()) / (1 - explained)
    shares = [explained + float(energies[:r].sum()) / total for r in range(len(energies) + 1)]
    assume(min(abs(s - eps) for s in shares) > 1e-9 or eps == 1.0)
    r = rank_to_reach(energies, total, eps, explained)
    assert shares[r] >= eps - 1e-9
    assert r == 0 or shares[r - 1] < eps
    before = rank_to_reach(energies, total, eps, explained, below=True)
    assert before == 0 or shares[before] < eps + 1e-9
    assert before == max(0, r - 1) or eps == 1.0


def test_rank_rules_by_hand():
    energies = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0])  # shares .5 .75 .875 .9375 1
    assert [rank_to_reach(energies, 16.0, eps) for eps in (0.4, 0.5, 0.6, 0.9, 1.0)] == [
        *(1, 1, 2, 4, 5)
    ]
    assert [rank_to_reach(energies, 16.0, eps, below=True) for eps in (0.4, 0.5, 0.6, 0.9)] == [
        *(0, 0, 1, 3)
    ]
    # All of it is all of it, also where rounding reaches 1 early, or something is known already.
    assert rank_to_reach(energies, 16.0, 1.0, below=True) == 5
    assert rank_to_reach(energies[:1], 8.0, 1.0, below=True) == 1
    assert rank_to_reach(energies, 16.0 - 1e-9, 1.0, explained=1e-9) == 5
    assert rank_to_reach(energies, 32.0, 0.75, explained=0.5) == 1
    assert rank_to_reach(energies, 32.0, 0.75, explained=0.8) == 0
    assert rank_to_reach(energies[:0], 0.0, 0.9) == 0
    assert rank_to_reach(energies[:0], 3.0, 0.9, explained=0.2) == 0


# -- Projection ------------------------------------------------------------------------------------


@small
@given(seeds, st.integers(1, 12), st.integers(1, 6), st.data())
def test_projection_is_the_dense_projector(seed, d, n, data):
    k = data.draw(st.integers(0, d))
    basis, rows = orthonormal(d, k, seed), randn(seed + 1, n, d)
    expected = rows - rows @ projector(basis)
    projection = Projection(basis)
    assert projection.cost == 2 * d * min(k, d - k)
    found = projection(rows)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(projection(found), found)
    again = rows.clone()
    assert projection.inplace(again) is again
    torch.testing.assert_close(again, expected)
    transposed = rows.t().contiguous().t()  # as Hugging Face's Conv1D holds its gradient
    projection.inplace(transposed)
    torch.testing.assert_close(transposed, expected)
    single = projection.to(rows.float())(rows.float())
    torch.testing.assert_close(single, expected.float(), atol=1e-5, rtol=1e-5)


def test_projection_of_rank_0_and_d():
    rows = randn(0, 3, 5, dtype=torch.float32)
    nothing = Projection(torch.zeros(5, 0)).to(rows)
    assert torch.equal(nothing(rows), rows)
    assert torch.equal(nothing.inplace(rows.clone()), rows)
    everything = Projection(orthonormal(5, 5)).to(rows)
    assert torch.equal(everything(rows), torch.zeros(3, 5))
    assert torch.equal(everything.inplace(rows.clone()), torch.zeros(3, 5))


@small
@given(seeds, st.integers(1, 8), st.data())
def test_importance_scales_directions(seed, d, data):
    k = data.draw(st.integers(0, d))
    basis, rows = orthonormal(d, k, seed), randn(seed + 1, 4, d)
    importance = torch.tensor(data.draw(st.lists(st.floats(0, 1), min_size=k, max_size=k))).double()
    found = Projection(basis, importance)(rows)
    torch.testing.assert_close(found, rows - rows @ basis * importance @ basis.t())
    torch.testing.assert_close(
        Projection(basis, torch.ones(k))(rows), Projection(basis)(rows), atol=1e-10, rtol=0
    )
    torch.testing.assert_close(Projection(basis, torch.zeros(k))(rows), rows)


@small
@given(seeds, st.integers(1, 8), st.data())
def test_what_is_inside_and_what_the_rest_is_mapped_to(seed, d, data):
    basis, rows = orthonormal(d, data.draw(st.integers(0, d)), seed), randn(seed + 1, 4, d)
    W, inside, outside = randn(seed + 2, 3, d), randn(0, 4, d), randn(0, 4, 3)
    Projection(basis).apart(rows, W, inside, outside)
    torch.testing.assert_close(inside, rows - rows @ projector(basis))
    torch.testing.assert_close(outside, rows @ projector(basis) @ W.t())
    torch.testing.assert_close(inside @ W.t() + outside, rows @ W.t())


@small
@given(seeds, st.integers(1, 8), st.floats(0.1, 2.0), st.data())
def test_scale_multiplies_what_is_left(seed, d, scale, data):
    basis, rows = orthonormal(d, data.draw(st.integers(0, d)), seed), randn(seed + 1, 4, d)
    projection = Projection(basis, scale=scale)
    expected = scale * (rows - rows @ projector(basis))
    torch.testing.assert_close(projection(rows), expected)
    torch.testing.assert_close(projection.inplace(rows.clone()), expected)
    assert projection.exact == (scale == 1.0)
    assert not projection.trivial or torch.equal(expected, rows)


# -- LinearMap -------------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """Hugging Face's linear layer: stores W^T."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).reshape(
            *x.shape[:-1], self.nf
        )


LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (7, 5)),
    "linear without bias": (lambda: nn.Linear(5, 4, bias=False), (7, 5)),
    "linear on tokens": (lambda: nn.Linear(5, 4), (3, 2, 5)),
    "Conv1D of Hugging Face": (lambda: Conv1D(4, 5), (3, 2, 5)),
    "conv": (lambda: nn.Conv2d(2, 3, (3, 2)), (3, 2, 6, 5)),
    "conv stride and padding": (lambda: nn.Conv2d(2, 3, 3, stride=(2, 3), padding=1), (3, 2, 6, 5)),
    "conv padding by axis": (lambda: nn.Conv2d(2, 3, 3, padding=(0, 2)), (3, 2, 6, 5)),
    "conv dilation": (lambda: nn.Conv2d(2, 3, 2, dilation=(3, 2), bias=False), (3, 2, 6, 5)),
    "conv same": (lambda: nn.Conv2d(2, 3, (2, 4), padding="same"), (3, 2, 6, 5)),
    "conv valid": (lambda: nn.Conv2d(2, 3, 2, padding="valid"), (3, 2, 6, 5)),
    "conv circular": (
        lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"),
        (3, 2, 6, 5),
    ),
    "conv reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (3, 2, 6, 5)),
    "conv same replicate": (
        lambda: nn.Conv2d(2, 3, 2, padding="same", padding_mode="replicate", dilation=3),
        (3, 2, 6, 5),
    ),
    "conv groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (3, 4, 6, 5)),
    "conv depthwise": (lambda: nn.Conv2d(3, 6, 2, groups=3, stride=2), (3, 3, 6, 5)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=2, dilation=2), (3, 2, 9)),
    "conv1d same circular": (
        lambda: nn.Conv1d(2, 4, 4, padding="same", padding_mode="circular", groups=2),
        (3, 2, 9),
    ),
}


@pytest.fixture(params=LAYERS, name="case")
def case_(request):
    make, shape = LAYERS[request.param]
    return make(), torch.randn(shape)


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


# -- Confinement -----------------------------------------------------------------------------------


def bases_for(layers, share):
    return {x.name: orthonormal(x.in_features, round(share * x.in_features)) for x in layers}


def confine(layers, bases, where):
    projections = {name: Projection(basis) for name, basis in bases.items()}
    return Confinement(layers, projections, where, dict.fromkeys(bases, 1.0))


def sgd_step(module, confined, x, lr=0.1):
    """(weight, bias) changes of one step of plain SGD, and the gradient of the input."""
    before = [p.detach().clone() for p in module.parameters()]
    optimizer = torch.optim.SGD(module.parameters(), lr=lr)
    optimizer.zero_grad()
    x = x.clone().requires_grad_()
    out = module(x)
    (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum().backward()
    confined.constrain()
    optimizer.step()
    confined.after_step()
    return [p.detach() - b for p, b in zip(module.parameters(), before, strict=True)], x.grad


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("where", ["gradient", "input", "step"])
@pytest.mark.usefixtures("always_inputs")
def test_all_places_give_the_dense_update(case, augment, share, where):
    module, x = case
    layers = linear_maps("l", module, augment)
    bases = bases_for(layers, share)
    raw, raw_input = sgd_step(copy.deepcopy(module), confine([], {}, "gradient"), x)
    confined = confine(layers, bases, where)
    found, found_input = sgd_step(module, confined, x)
    confined.release()
    torch.testing.assert_close(found_input, raw_input)
    expected = [change.clone() for change in raw]
    bias = None if layers[0].bias is None else 1
    for layer in layers:
        parts = raw[0], None if bias is None else raw[1]
        dense = layer.matrix(*parts).double()
        dense = dense - dense @ projector(bases[layer.name])
        layer.store(dense.float(), expected[0], None if bias is None else expected[1])
    for change, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(change, wanted, atol=1e-5, rtol=1e-5)
    if share == 1.0:  # SGD's own rounding of w - lr * g aside
        guarded = torch.cat([layer.matrix(*found, *[None] * (bias is None)) for layer in layers])
        assert float(guarded.abs().max()) < 1e-6


@pytest.mark.parametrize("where", ["gradient", "input", "step"])
@pytest.mark.usefixtures("always_inputs")
def test_rank_0_is_plain_sgd_bit_for_bit(case, where):
    module, x = case
    layers = linear_maps("l", module)
    raw, _ = sgd_step(copy.deepcopy(module), confine([], {}, "gradient"), x)
    found, _ = sgd_step(module, confine(layers, bases_for(layers, 0.0), where), x)
    assert all(torch.equal(a, b) for a, b in zip(raw, found, strict=True))


@pytest.mark.parametrize("where", ["gradient", "input", "step"])
@pytest.mark.usefixtures("always_inputs")
def test_full_rank_does_not_move_at_all(where):
    module, x = nn.Linear(5, 4), torch.randn(7, 5)
    layers = linear_maps("l", module, augment=True)
    before = copy.deepcopy(module.state_dict())
    confined = confine(layers, bases_for(layers, 1.0), where)
    for _ in range(3):
        sgd_step(module, confined, x)
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


@pytest.mark.parametrize("where", ["gradient", "input", "step"])
@pytest.mark.usefixtures("always_inputs")
def test_outputs_in_the_subspace_stay_and_others_move(where):
    module = nn.Linear(8, 4)
    layers = linear_maps("l", module, augment=True)
    old = F.pad(torch.randn(3, 8), (0, 1), value=1.0).double()
    basis = torch.linalg.qr(old.t())[0]
    inside, outside = old[:, :-1].float(), torch.randn(5, 8)
    before = module(inside).detach(), module(outside).detach()
    confined = confine(layers, {"l": basis}, where)
    for i in range(5):
        sgd_step(module, confined, torch.randn(6, 8) + i)
    torch.testing.assert_close(module(inside), before[0], atol=1e-5, rtol=1e-5)
    moved = module(outside).detach() - before[1]
    assert float(moved.norm()) > 0.1 * float(before[1].norm())


LEAKING = {
    "Adam": functools.partial(torch.optim.Adam, lr=0.01),
    "AdamW": functools.partial(torch.optim.AdamW, lr=0.01),
    "decay": functools.partial(torch.optim.SGD, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("optimizer", LEAKING)
@pytest.mark.parametrize("where", ["gradient", "step"])
def test_only_the_projected_step_holds_for_any_optimizer(optimizer, where):
    module = nn.Linear(12, 6, bias=False)
    layers = linear_maps("l", module)
    basis = orthonormal(12, 5)
    confined = confine(layers, {"l": basis}, where)
    before = module.weight.detach().clone()
    updating = LEAKING[optimizer](module.parameters())
    for i in range(20):
        updating.zero_grad()
        (module(randn(i, 7, 12, dtype=torch.float32)).square().mean()).backward()
        confined.constrain()
        updating.step()
        confined.after_step()
    change = (module.weight.detach() - before).double()
    leak = float((change @ basis).norm() / change.norm())
    assert float(change.norm()) > 0
    assert leak < 1e-5 if where == "step" else leak > 1e-2


def test_layers_without_gradient_are_left_alone():
    module = nn.Linear(5, 4)
    module.requires_grad_(False)
    before = copy.deepcopy(module.state_dict())
    for where in ("gradient", "step"):
        confined = confine(linear_maps("l", module, True), {"l": orthonormal(6, 3)}, where)
        confined.constrain()
        confined.after_step()
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def test_inputs_are_projected_only_where_that_saves_work():
    wide, narrow = nn.Linear(2000, 1000, bias=False), nn.Linear(8, 4, bias=False)
    layers = [LinearMap("wide", wide), LinearMap("narrow", narrow)]
    bases = {"wide": torch.eye(2000)[:, :100], "narrow": torch.eye(8)[:, :2]}
    projections = {name: Projection(basis) for name, basis in bases.items()}
    few = Confinement(layers, projections, "input", {"wide": 10, "narrow": 1})
    assert type(wide) is not nn.Linear
    assert type(narrow) is nn.Linear
    few.release()
    assert type(wide) is nn.Linear
    Confinement(layers, projections, "input", {"wide": 1000, "narrow": 1000})
    assert type(wide) is nn.Linear


@pytest.mark.parametrize("where", ["gradient", "input", "step"])
@pytest.mark.usefixtures("always_inputs")
def test_one_layer_is_confined_otherwise_and_the_rest_keeps_what_it_prepared(where):
    modules = {"a": nn.Linear(6, 4, bias=False), "b": nn.Linear(6, 4, bias=False)}
    bases = {name: orthonormal(6, 2) for name in modules}
    confined = confine([LinearMap(*pair) for pair in modules.items()], bases, where)
    prepared = {name: getattr(module, "ahead", None) for name, module in modules.items()}
    bases["b"] = orthonormal(6, 4)
    confined.replace({"b": Projection(bases["b"])})
    assert getattr(modules["a"], "ahead", None) is prepared["a"]
    for name, module in modules.items():
        (change,), _ = sgd_step(module, confined, torch.randn(5, 6))
        assert change.norm() > 1e-3
        assert (change @ bases[name].float()).norm() < 1e-5 * change.norm()
    confined.replace({"a": Projection(bases["a"][:, :0]), "b": Projection(bases["b"][:, :0])})
    assert all(type(module) is nn.Linear for module in modules.values())
    (change,), _ = sgd_step(modules["a"], confined, torch.randn(5, 6))
    assert (change @ bases["a"].float()).norm() > 1e-2 * change.norm()
    confined.release()


# -- layers whose gradient is born projected -------------------------------------------------------


@pytest.fixture
def confined_linear(always_inputs):
    linear = nn.Linear(6, 4, bias=False)
    basis = orthonormal(6, 3)
    return linear, basis, confine([LinearMap("l", linear)], {"l": basis}, "input")


def weight_gradient(linear, x):
    linear.weight.grad = None
    linear(x).square().sum().backward()
    return linear.weight.grad.clone()


def raw_gradient(weight, x):
    return 2 * weight.detach() @ x.t() @ x


def assert_projected(gradient, weight, x, basis):
    raw = raw_gradient(weight, x).double()
    expected = (raw - raw @ projector(basis)).float()
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)


def test_a_copy_uses_its_own_weights(confined_linear):
    linear, basis, _ = confined_linear
    x = torch.randn(20, 6)
    weight_gradient(linear, x[:5])
    twin = copy.deepcopy(linear)
    with torch.no_grad():
        twin.weight.mul_(3.0)
    for copied in (linear, twin):
        for piece in (x[:5], torch.randn(4, 6)):
            torch.testing.assert_close(copied(piece), piece @ copied.weight.t())
            assert_projected(weight_gradient(copied, piece), copied.weight, piece, basis)


def test_unconfined_yields_raw_gradients(confined_linear):
    linear, basis, _ = confined_linear
    x = torch.randn(5, 6)
    with unconfined():
        torch.testing.assert_close(weight_gradient(linear, x), raw_gradient(linear.weight, x))
        with unconfined():
            pass
        torch.testing.assert_close(weight_gradient(linear, x), raw_gradient(linear.weight, x))
    assert_projected(weight_gradient(linear, x), linear.weight, x, basis)


def test_release_restores_the_plain_layer(confined_linear):
    linear, _, confined = confined_linear
    x = torch.randn(5, 6)
    keys = set(nn.Linear(6, 4, bias=False).__dict__)
    assert list(linear.state_dict()) == ["weight"]
    assert isinstance(linear, nn.Linear)
    confined.release()
    assert type(linear) is nn.Linear
    assert set(linear.__dict__) == keys
    torch.testing.assert_close(weight_gradient(linear, x), raw_gradient(linear.weight, x))
    confined.constrain()
    confined.release()


@pytest.mark.usefixtures("always_inputs")
def test_a_second_derivative_is_refused():
    linear = nn.Linear(6, 4)
    confine(linear_maps("l", linear), {"l": orthonormal(6, 3)}, "input")
    x = torch.randn(5, 6, requires_grad=True)
    (g,) = torch.autograd.grad(linear(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        g.sum().backward()


@pytest.mark.parametrize("drawn", [False, True])
def test_slices_of_a_fetched_tensor_learn_the_same(confined_linear, drawn):
    linear, basis, _ = confined_linear
    data, index = torch.randn(30, 6), torch.randperm(30)[:20]
    plain = copy.deepcopy(linear)
    for _ in range(2):
        fetched = data[index]
        if drawn:
            mark_drawn(fetched, data, index)
        for piece in fetched.reshape(4, 5, 6):
            known = linear.ahead.of(piece, linear.weight)
            assert known is not None
            projected = piece.double() - piece.double() @ projector(basis)
            torch.testing.assert_close(known[0], projected.float(), atol=1e-5, rtol=1e-5)
            out, expected = linear(piece), plain(piece.clone())
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
            found = weight_gradient(linear, piece)
            torch.testing.assert_close(
                found, weight_gradient(plain, piece.clone()), atol=1e-4, rtol=1e-4
            )
            with torch.no_grad():
                linear.weight.sub_(0.01 * found)
                plain.weight.sub_(0.01 * plain.weight.grad)


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("when", ["before the first step", "between steps"])
def test_a_batch_changed_in_place_is_noticed(confined_linear, drawn, when):
    linear, basis, _ = confined_linear
    data, index = torch.randn(30, 6), torch.arange(20)
    fetched = data[index]
    if drawn:
        mark_drawn(fetched, data, index)
    batches = fetched.reshape(4, 5, 6)
    if when == "between steps":
        weight_gradient(linear, batches[0])
    fetched.mul_(-2.0).add_(1.0)
    torch.testing.assert_close(linear(batches[1]), batches[1] @ linear.weight.t())
    assert_projected(weight_gradient(linear, batches[1]), linear.weight, batches[1], basis)


def test_a_task_resumed_between_steps_goes_on_bit_for_bit(confined_linear):
    linear, basis, confined = confined_linear
    data = torch.randn(30, 6)

    def steps(layer):
        for index in torch.arange(30).reshape(2, 15):
            fetched = data[index]
            mark_drawn(fetched, data, index)
            for piece in fetched.reshape(3, 5, 6):
                gradient = weight_gradient(layer, piece)
                with torch.no_grad():
                    layer.weight.sub_(0.01 * gradient)

    steps(linear)
    state, weight = confined.state_dict(), linear.weight.detach().clone()
    steps(linear)
    resumed = nn.Linear(6, 4, bias=False)
    resumed.weight.data.copy_(weight)
    again = confine([LinearMap("l", resumed)], {"l": basis}, "input")
    again.load_state_dict(state)
    steps(resumed)
    assert torch.equal(resumed.weight, linear.weight)


def test_what_is_no_slice_of_rows_takes_the_plain_way(confined_linear):
    linear, basis, _ = confined_linear
    fetched = torch.randn(8, 12)
    views = [
        fetched[:, :6],  # half of each row
        fetched[:, 3:9],
        torch.randn(6, 8).t(),
        torch.randn(5, 6)[::2],
        torch.randn(5, 6).reshape(5, 6),  # one fetched for this step alone
        torch.randn(49)[1:].view(8, 6),
        torch.randn(50)[1:49].view(8, 6),
    ]
    for x in views:
        torch.testing.assert_close(linear(x), x @ linear.weight.t())
        assert_projected(weight_gradient(linear, x), linear.weight, x, basis)


def test_halves_of_rows_are_rows_of_half_the_length(confined_linear):
    linear, basis, _ = confined_linear
    fetched = torch.randn(8, 12)
    for x in (fetched[2:4].view(4, 6), fetched.view(16, 6)[3:8], fetched[3:4, 6:]):
        torch.testing.assert_close(linear(x), x @ linear.weight.t(), atol=1e-5, rtol=1e-5)
        assert_projected(weight_gradient(linear, x), linear.weight, x, basis)


def test_inputs_that_need_a_gradient_get_it(confined_linear):
    linear, _, _ = confined_linear
    fetched = torch.randn(20, 6, requires_grad=True)
    linear(fetched[:5]).sum().backward()
    torch.testing.assert_close(fetched.grad[:5], linear.weight.detach().sum(0).expand(5, 6))


def test_data_in_another_memory_order_is_projected_too(confined_linear):
    linear, basis, _ = confined_linear
    data = torch.randn(30, 3, 2).transpose(1, 2)
    fetched = data.index_select(0, torch.arange(20))
    mark_drawn(fetched, data, torch.arange(20))
    x = fetched[5:10].flatten(1)
    torch.testing.assert_close(linear(x), x @ linear.weight.t(), atol=1e-5, rtol=1e-5)
    assert_projected(weight_gradient(linear, x), linear.weight, x, basis)


def test_data_too_large_is_projected_step_by_step(confined_linear, monkeypatch):
    linear, basis, _ = confined_linear
    data = torch.randn(30, 6)
    fetched = data[torch.arange(20)]
    mark_drawn(fetched, data, torch.arange(20))
    monkeypatch.setattr(ahead, "DATA_ELEMENTS", 10)
    for limit in (1 << 22, 10):
        monkeypatch.setattr(ahead, "FETCHED_ELEMENTS", limit)
        linear.ahead = ahead.InputsAhead(Projection(basis))
        x = fetched[5:10]
        assert (linear.ahead.of(x, linear.weight) is None) == (limit == 10)
        assert_projected(weight_gradient(linear, x), linear.weight, x, basis)


def test_under_autocast_a_confined_layer_computes_in_full_precision():
    linear = nn.Linear(20, 30, bias=False)
    M = torch.linalg.qr(torch.randn(20, 5))[0]
    confinement.ConfinedLinear.attach(linear, Projection(M), False)
    x = torch.randn(4, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear(nn.Linear(20, 20)(x))
    out.square().sum().backward()
    assert out.dtype == torch.float32
    assert float(linear.weight.grad.norm()) > 0
    assert float((linear.weight.grad @ M).norm()) <= 1e-5 * float(linear.weight.grad.norm())
