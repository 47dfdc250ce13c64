"""A frozen space split by principal angles, and leading directions."""

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from spaces import assert_orthonormal, orthonormal
from torch.nn.functional import pad

from cl_bench.subspace import leading_directions, split_as_published, split_by_angle


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
    assert_orthonormal(rest, 1e-5)
    gap = skewed.t() @ skewed - torch.eye(6).double()
    assert float(gap.abs().max()) > 1e-2


def test_leading_directions_take_in_the_one_that_crosses():
    rows = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0]))
    for share, count in ((0.5, 1), (0.65, 2), (0.93, 3), (1.0, 3)):
        U = leading_directions(rows, share)
        assert U.shape == (4, count)
        torch.testing.assert_close(U.abs(), torch.eye(4)[:, :count].double())
    assert leading_directions(torch.zeros(3, 4), 0.5).shape == (4, 0)
