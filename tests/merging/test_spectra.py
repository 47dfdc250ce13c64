"""OPCM, Iso, TSV-M, DOP and Core Space: what their formulas promise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MATRICES, close, counts, flat, folded_over, model, seeds, task_vectors

from cl_bench.merging import (
    Average,
    Dop,
    IsoC,
    IsoCts,
    Opcm,
    TaskArithmetic,
    Ties,
    core_space,
    flattened,
    merge,
    to_core,
    update,
)
from cl_bench.merging.dop import balanced, truncated
from cl_bench.merging.opcm import leading, projected
from cl_bench.merging.spectral import common_and_specific, polar, singular_vectors_merged

quick = settings(deadline=None, max_examples=15)
shapes = st.tuples(st.integers(2, 9), st.integers(2, 9))
shares = st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0])


def matrix(seed, shape, rank=None):
    rng = torch.Generator().manual_seed(seed)
    if rank is None:
        return torch.randn(shape, generator=rng, dtype=torch.float64)
    left, right = (torch.randn(n, rank, generator=rng, dtype=torch.float64) for n in shape)
    return left @ right.t()


def matrices(seed, shape, count):
    return [matrix(seed + 31 * t, shape) for t in range(count)]


# -- OPCM ------------------------------------------------------------------------------------------


def projected_in_full(merge, delta, alpha):
    """With the full bases, entry by entry."""
    u, s, vh = torch.linalg.svd(merge, full_matrices=True)
    z = u.t() @ delta @ vh.t()
    z.diagonal().zero_()
    share, r = 0.0, 0
    for value in s / s.sum():
        share += float(value)
        if share > alpha:
            break
        r += 1
    z[:r, :r] = 0
    return u @ z @ vh


@given(seed=seeds, shape=shapes, alpha=st.sampled_from([0.0, 0.2, 0.5, 0.8]))
@quick
def test_opcms_thin_form_is_the_full_one(seed, shape, alpha):
    before, tau = matrices(seed, shape, 2)
    torch.testing.assert_close(
        projected(before, tau, alpha), projected_in_full(before, tau, alpha), atol=1e-12, rtol=0
    )


@given(seed=seeds, shape=shapes, alpha=shares)
@quick
def test_opcm_leaves_zeros_on_the_diagonal_and_in_the_leading_block(seed, shape, alpha):
    before, tau = matrices(seed, shape, 2)
    u, s, vh = torch.linalg.svd(before, full_matrices=False)
    z = u.t() @ projected(before, tau, alpha) @ vh.t()
    r = leading(s, alpha)
    assert z.diagonal().abs().max() < 1e-12
    assert r == 0 or z[:r, :r].abs().max() < 1e-12
    assert abs(float((projected(before, tau, alpha) * before).sum())) < 1e-11


def test_the_arbitrary_bases_of_the_merges_null_space_change_nothing():
    before, tau = matrix(0, (9, 8), rank=3), matrix(1, (9, 8))
    noise = 1e-14 * matrix(2, (9, 8))
    one, other = projected(before, tau, 0.5), projected(before + noise, tau, 0.5)
    torch.testing.assert_close(one, other, atol=1e-10, rtol=0)
    full = [projected_in_full(b, tau, 0.5) for b in (before, before + noise)]
    assert (full[0] - full[1]).norm() > 0.01 * tau.norm()  # the control


def test_of_a_square_matrix_of_full_rank_alpha_one_leaves_nothing():
    before, tau = matrices(0, (6, 6), 2)
    assert leading(torch.linalg.svdvals(before), 1.0) == 6
    assert projected(before, tau, 1.0).abs().max() < 1e-13
    assert projected(before, tau, 0.5).norm() > 0.1 * tau.norm()  # the control


@given(seed=seeds, count=counts)
@quick
def test_opcms_merge_is_as_long_as_the_models_are_on_average(seed, count):
    vectors = task_vectors(seed, count)
    found = update(Opcm(), folded_over(Opcm(), vectors), MATRICES)
    mean = sum(float(flat(v).norm()) for v in vectors) / count
    assert float(flat(found).norm()) == pytest.approx(mean, rel=1e-12)


def test_opcms_sum_is_the_published_recursion():
    """W_t = W_0 + (lambda_{t-1} (W_{t-1} - W_0) + P(tau_t)) / lambda_t, step by step."""
    base, vectors = model(9), task_vectors(5, 5)
    now = {n: base[n] + vectors[0][n] for n in base}
    lam, norms = 1.0, [float(flat(vectors[0]).norm())]
    for tau in vectors[1:]:
        norms.append(float(flat(tau).norm()))
        step = {}
        for name in base:
            d = now[name] - base[name]
            new = projected_in_full(d, tau[name], 0.5) if name in MATRICES else tau[name]
            step[name] = lam * d + new
        lam = float(flat(step).norm()) / (sum(norms) / len(norms))
        now = {n: base[n] + step[n] / lam for n in base}
    models = [{n: base[n] + tau[n] for n in base} for tau in vectors]
    close(merge(Opcm(), base, models, MATRICES), now, atol=1e-11)


# -- Iso, TSV-M ------------------------------------------------------------------------------------


@given(seed=seeds, shape=shapes, count=counts)
@quick
def test_isos_spectrum_is_flat_and_its_mean_that_of_the_sum(seed, shape, count):
    vectors = [{"w": m} for m in matrices(seed, shape, count)]
    found = update(IsoC(), folded_over(IsoC(), vectors, matrices={"w"}), {"w"})["w"]
    s = torch.linalg.svdvals(found)
    wanted = torch.linalg.svdvals(sum(v["w"] for v in vectors)).mean()
    torch.testing.assert_close(s, wanted.expand_as(s), atol=1e-11, rtol=0)


@given(seed=seeds, shape=shapes)
@quick
def test_iso_scales_and_turns_with_its_input(seed, shape):
    tau = matrix(seed, shape)
    q, r = polar(matrix(seed + 1, (shape[0],) * 2)), polar(matrix(seed + 2, (shape[1],) * 2))
    torch.testing.assert_close(flattened(3 * q @ tau @ r), 3 * q @ flattened(tau) @ r)


def test_iso_leaves_directions_alone_in_which_nothing_moved():
    tau = matrix(0, (9, 8), rank=3)
    found = flattened(tau, 1e-6)
    s = torch.linalg.svdvals(found)
    assert s[3:].max() < 1e-12
    torch.testing.assert_close(s[:3], torch.linalg.svdvals(tau)[:3].mean().expand(3))
    inside = tau @ torch.linalg.pinv(tau)
    assert (found - inside @ found).norm() < 1e-12
    published = flattened(tau)  # the control: it fills them
    assert (published - inside @ published).norm() > 0.5 * published.norm()


@given(seed=seeds, count=st.integers(1, 4), common=st.sampled_from([0.0, 0.3, 0.8]))
@quick
def test_iso_ctss_spectrum_is_flat(seed, count, common):
    found = common_and_specific(matrices(seed, (9, 12), count), common)
    s = torch.linalg.svdvals(found)
    torch.testing.assert_close(s, s.mean().expand_as(s), atol=1e-11, rtol=0)


@given(seed=seeds, shape=shapes, count=counts)
@quick
def test_iso_cts_of_common_directions_alone_is_iso_c(seed, shape, count):
    taus = matrices(seed, shape, count)
    torch.testing.assert_close(
        common_and_specific(taus, 1.0), flattened(sum(taus)), atol=1e-11, rtol=0
    )


@pytest.mark.parametrize(("least", "tasks", "common"), [(12, 8, 0.0), (16, 20, 0.2), (3, 5, 0.8)])
def test_rounding_never_asks_for_more_directions_than_there_are(least, tasks, common):
    found = common_and_specific(matrices(0, (least, 24), tasks), common)
    s = torch.linalg.svdvals(found)
    assert len(s) == least
    torch.testing.assert_close(s, s.mean().expand_as(s), atol=1e-10, rtol=0)


def test_tsv_m_of_orthogonal_tasks_is_their_sum_and_many_tasks_keep_a_triplet_each():
    u, v = polar(matrix(0, (8, 8))), polar(matrix(1, (8, 8)))
    s = torch.tensor([5.0, 4.0, 3.0, 2.0], dtype=torch.float64)
    taus = [u[:, k : k + 4] * s @ v[k : k + 4] for k in (0, 4)]
    torch.testing.assert_close(singular_vectors_merged(taus), sum(taus))
    many = matrices(0, (3, 12), 9)  # fewer singular values than tasks
    assert singular_vectors_merged(many).norm() > 0.1 * many[0].norm()


# -- DOP -------------------------------------------------------------------------------------------


@given(seed=seeds, shape=shapes, a=st.sampled_from([0.2, 0.5, 0.8]))
@quick
def test_dop_is_where_the_objective_is_flat(seed, shape, a):
    deltas, weights = matrices(seed, shape, 2), (a, 1 - a)
    found = balanced(deltas, weights, 1.0).requires_grad_()
    loss = 0.0
    for delta, weight in zip(deltas, weights, strict=True):
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        left = (s[:, None] * (u.t() @ (found - delta))).square().sum()
        right = ((found - delta) @ vh.t() * s).square().sum()
        loss = loss + weight * (left + right)
    (gradient,) = torch.autograd.grad(loss, found)
    assert gradient.norm() < 1e-9 * sum(d.norm() ** 3 for d in deltas)


def test_dop_of_the_same_model_again_is_that_model():
    (tau,) = task_vectors(3, 1)
    close(update(Dop(), folded_over(Dop(), [tau] * 3), MATRICES), tau, atol=1e-10)


def test_what_dops_terms_do_not_look_at_stays_the_mean():
    one, other = matrix(0, (9, 8), rank=2), matrix(1, (9, 8), rank=2)
    found = balanced([one, other], (0.8, 0.2), 1.0)
    left = torch.eye(9, dtype=torch.float64) - (
        both := torch.cat([one, other], 1)
    ) @ torch.linalg.pinv(both)
    assert (left @ found).norm() < 1e-11
    assert truncated(one, 0.99999).norm() <= one.norm()


# -- Core Space ------------------------------------------------------------------------------------


def factors(seed, count, shape=(12, 10), rank=2):
    return [
        {"w": (matrix(seed + 7 * t, (shape[0], rank)), matrix(seed + 7 * t + 1, (rank, shape[1])))}
        for t in range(count)
    ]


@given(seed=seeds, count=counts, rank=st.integers(1, 4))
@quick
def test_core_space_loses_nothing(seed, count, rank):
    models = factors(seed, count, rank=rank)  # up to 20 ranks in 10 inputs
    cores, u, vh = to_core([m["w"] for m in models])
    for core, m in zip(cores, models, strict=True):
        b, a = m["w"]
        assert (u @ core @ vh - b @ a).norm() < 1e-10 * (b @ a).norm()
    torch.testing.assert_close(u.t() @ u, torch.eye(u.shape[1], dtype=torch.float64))


@pytest.mark.parametrize("rule", [Average(), TaskArithmetic()], ids=lambda r: type(r).__name__)
@given(seed=seeds, count=counts)
@quick
def test_linear_rules_are_the_same_in_both_spaces(rule, seed, count):
    models = factors(seed, count)
    whole = [{"w": m["w"][0] @ m["w"][1]} for m in models]
    found = core_space(models, rule)
    close(found, update(rule, folded_over(rule, whole, matrices={"w"}), {"w"}), atol=1e-10)


def test_rules_on_entries_differ_there_and_iso_is_that_of_the_numerical_rank():
    models = factors(0, 3)
    whole = [{"w": m["w"][0] @ m["w"][1]} for m in models]
    ties = Ties(scale=1.0)
    one, other = (
        core_space(models, ties)["w"],
        update(ties, folded_over(ties, whole, matrices={"w"}), {"w"})["w"],
    )
    assert (one - other).norm() > 0.1 * other.norm()
    iso = core_space(models, IsoC(rank_cut=0.0))["w"]
    torch.testing.assert_close(iso, flattened(sum(m["w"] for m in whole), 1e-9), atol=1e-10, rtol=0)


def test_one_model_comes_back_from_core_space():
    (m,) = factors(3, 1)
    torch.testing.assert_close(
        core_space([m], TaskArithmetic(scale=1.0))["w"], m["w"][0] @ m["w"][1]
    )


def test_core_space_needs_the_same_weights_of_all():
    one, other = factors(0, 2)
    with pytest.raises(ValueError, match="the same weights"):
        core_space([one, {"v": other["w"]}], IsoCts())
