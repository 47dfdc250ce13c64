"""Second moments of inputs, against SVDs."""

import functools

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from spaces import assert_orthonormal, orthonormal, projector, randn, seeds, small

from cl_bench.subspace import Moments


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
