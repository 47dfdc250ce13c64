"""Orthonormal bases, ranks and projections, against dense matrices."""

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from spaces import assert_orthonormal, orthonormal, projector, randn, seeds, small

from cl_bench.subspace import Projection, complement, extend, rank_to_reach

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
