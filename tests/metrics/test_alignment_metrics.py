"""Formulas on updates, features, knowledge and dynamics: what holds whatever the numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cl_bench.metrics import (
    alignment_ratio,
    at_chance,
    compare_subspaces,
    component_angle,
    component_gap,
    drift,
    drops,
    dynamics,
    flat_cosine,
    linear_cka,
    matched,
    null_angle,
    overlap_excess,
    principal_directions,
    principal_subspace,
    shift_in_top,
    spurious_fraction,
    subspace_angles,
)
from cl_bench.metrics.plane import at, describe_plane, project

seeds = st.integers(0, 10_000)
scores = st.floats(0, 1)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(seed, n):
    return torch.linalg.qr(normal(seed, n, n))[0]


# -- angles between updates ---------------


@given(seeds, st.sampled_from([-3.0, 1e-6, 1.0, 1e4]))
def test_an_update_and_its_multiples_are_at_angle_zero(seed, factor):
    A = normal(seed, 12, 7)
    U, V = principal_subspace(A), principal_subspace(factor * A)
    assert float(subspace_angles(U, V).max()) < 1e-5
    assert overlap_excess(U, V) == pytest.approx(1)
    assert flat_cosine(A, factor * A) == pytest.approx(math.copysign(1, factor))


@given(seeds)
def test_updates_of_different_outputs_are_at_right_angles(seed):
    A, B = normal(seed, 10, 6), normal(seed + 1, 10, 6)
    A[5:], B[:5] = 0, 0
    angles = subspace_angles(principal_subspace(A), principal_subspace(B))
    assert float((angles - 90).abs().max()) < 1e-9
    assert flat_cosine(A, B) == 0


@given(seeds, st.integers(1, 20), st.integers(1, 20), st.integers(1, 30))
def test_angles_lie_between_0_and_90_and_the_excess_is_at_most_1(seed, m, n, k):
    found = compare_subspaces(
        principal_subspace(normal(seed, m, n)), principal_subspace(normal(seed + 1, m, k))
    )
    for name in ("mean", "q25", "median", "q75", "max", "null"):
        assert 0 <= found[f"theta_{name}"] <= 90
    assert found["theta_q25"] <= found["theta_median"] <= found["theta_q75"] <= found["theta_max"]
    assert math.isnan(found["overlap_excess"]) or found["overlap_excess"] <= 1 + 1e-12
    assert math.isnan(found["overlap_excess"]) == (found["rank_a"] == m)


@pytest.mark.parametrize(("m", "r"), [(96, 10), (96, 60), (200, 150)])
def test_random_subspaces_are_at_the_null_angle_and_have_no_excess(m, r):
    U, V = orthogonal(1, m)[:, :r], orthogonal(2, m)[:, :40]
    assert float(subspace_angles(U, V).mean()) == pytest.approx(null_angle(r, m), abs=2)
    assert overlap_excess(U, V) == pytest.approx(0, abs=0.05)


def test_null_angles_of_the_spec():
    assert null_angle(600, 768) == pytest.approx(27.9, abs=0.1)
    assert null_angle(100, 768) == pytest.approx(69, abs=0.2)


@given(seeds)
def test_at_full_rank_the_input_side_does_not_matter(seed):
    A = normal(seed, 12, 5)
    mixing = normal(seed + 1, 5, 5) + 4 * torch.eye(5, dtype=torch.float64)
    B = normal(seed + 2, 12, 3)
    U, V = principal_subspace(A, 1.0), principal_subspace(A @ mixing, 1.0)
    W = principal_subspace(B, 1.0)
    assert U.shape == V.shape == (12, 5)
    assert torch.allclose(subspace_angles(U, W), subspace_angles(V, W), atol=1e-5)


@given(seeds, st.floats(0.3, 0.999))
def test_the_principal_subspace_is_the_smallest_that_holds_the_energy(seed, energy):
    for A in (normal(seed, 8, 6), normal(seed, 6, 40)):  # by singular values, and by A A^T
        U = principal_subspace(A, energy)
        held = float((U.t() @ A).square().sum() / A.square().sum())
        less = float((U[:, :-1].t() @ A).square().sum() / A.square().sum())
        assert held >= energy - 1e-9
        assert less < energy
        assert torch.allclose(U.t() @ U, torch.eye(U.shape[1], dtype=U.dtype), atol=1e-10)


def test_nothing_moved_is_nan_and_no_crash():
    zero, other = torch.zeros(5, 3), normal(0, 5, 3)
    for pair in ((zero, other), (other, zero), (zero, zero)):
        found = compare_subspaces(*map(principal_subspace, pair))
        assert math.isnan(found["theta_mean"])
        assert math.isnan(found["overlap_excess"])
        assert math.isnan(flat_cosine(*pair))


def test_standardising_adds_a_direction_that_is_not_there():
    """Why it is off: an update of rank 1 gets a second direction from its mean alone."""
    A = torch.outer(torch.arange(1.0, 6), torch.tensor([1.0, 1, 1, 2]))
    assert principal_subspace(A, 0.9999).shape[1] == 1
    assert principal_subspace(A, 0.9999, standardise=True).shape[1] == 2


# -- drift of features ---------------


@given(seeds, st.floats(0.1, 50), st.sampled_from([-1.0, 1.0]))
def test_components_know_no_sign_no_offset_and_no_scale(seed, scale, sign):
    H = normal(seed, 30, 6) * torch.tensor([5.0, 1, 1, 1, 1, 1])
    moved = sign * scale * H + normal(seed + 1, 1, 6)
    assert component_angle(H, moved) < 1e-4
    assert component_angle(H, H) < 1e-6
    assert component_gap(moved) == pytest.approx(component_gap(H))


def test_swapped_variances_turn_the_component_by_90_degrees():
    H = normal(0, 400, 2)
    H = torch.linalg.qr(H - H.mean(0))[0]  # uncorrelated exactly
    one, other = H * torch.tensor([3.0, 1.0]), H * torch.tensor([1.0, 3.0])
    assert component_angle(one, other) == pytest.approx(90)
    assert component_gap(one) == pytest.approx(1 - 1 / 9)


@given(seeds, st.floats(0.01, 0.4))
def test_the_component_turns_no_further_than_davis_and_kahan_allow(seed, size):
    H = normal(seed, 60, 5) * torch.tensor([4.0, 2, 1, 1, 1])
    moved = H + size * normal(seed + 1, 60, 5)
    C, D = (torch.cov(X.t()) for X in (H, moved))
    values = torch.linalg.eigvalsh(C)
    bound = 2 * float(torch.linalg.matrix_norm(D - C, 2) / (values[-1] - values[-2]))
    assert math.sin(math.radians(component_angle(H, moved))) <= bound + 1e-9


@given(seeds, st.integers(3, 40), st.sampled_from([-2.0, 0.5, 7.0]))
def test_cka_does_not_see_rotations_and_factors(seed, n, factor):
    H = normal(seed, n, 8)
    assert linear_cka(H, factor * H @ orthogonal(seed + 1, 8)) == pytest.approx(1)
    assert 0 <= linear_cka(H, normal(seed + 2, n, 8)) <= 1 + 1e-12


def test_cka_is_the_same_number_by_samples_and_by_features():
    X, Y = normal(0, 12, 10), normal(1, 12, 10)
    wide = [torch.cat([H, torch.zeros(12, 8)], 1) for H in (X, Y)]  # more features than samples
    assert linear_cka(X, Y) == pytest.approx(linear_cka(*wide))


@given(seeds, st.integers(1, 4))
def test_a_shift_lies_inside_the_top_components_or_outside_or_both(seed, k):
    H = normal(seed, 30, 8)
    V = principal_directions(H, k)[0]
    inside = normal(seed + 1, 30, k) @ V.t()
    outside = normal(seed + 2, 30, 8)
    outside = outside - outside @ V @ V.t()
    assert shift_in_top(H, H + inside, k) == pytest.approx(1)
    assert shift_in_top(H, H + outside, k) == pytest.approx(0, abs=1e-12)
    assert 0 < shift_in_top(H, H + inside + outside, k) < 1


def test_drift_of_nothing_and_of_states_that_do_not_vary():
    H = normal(0, 20, 4)
    still = drift(H, H, 2)
    assert (still["shift"], still["cka"]) == (0, pytest.approx(1))
    assert still["pc_angle"] < 1e-6
    assert math.isnan(still["shift_in_top"])
    assert drift(H, H + 1e-3, 2)["shift"] > 0
    constant = drift(torch.ones(20, 4), H, 2)
    for name in ("pc_angle", "pc_gap", "cka", "shift_in_top"):
        assert math.isnan(constant[name])


# -- knowledge and alignment ---------------


@given(scores, scores)
def test_performance_is_knowledge_times_alignment(perf, recovered):
    if perf <= recovered and recovered > 0:
        assert alignment_ratio(perf, recovered) * recovered == pytest.approx(perf)
    if recovered > 0:
        assert 0 <= alignment_ratio(perf, recovered) <= 1
    assert math.isnan(alignment_ratio(perf, 0.0))


@given(scores, scores, scores, scores)
def test_drops_add_up(perf, recovered, perf_learned, recovered_learned):
    found = drops(perf, recovered, perf_learned, recovered_learned, True)
    assert found["knowledge_drop"] + found["alignment_drop"] == pytest.approx(found["drop"])
    assert math.isnan(found["spurious_fraction"]) == (found["drop"] <= 0.05)
    without = drops(perf, recovered, perf_learned, recovered_learned, False)
    assert math.isnan(without["spurious_fraction"])


def test_spurious_fraction_at_its_ends():
    assert spurious_fraction(0.5, 0.0) == 1
    assert spurious_fraction(0.5, -0.1) == 1  # knowledge grew
    assert spurious_fraction(0.5, 0.5) == 0
    assert math.isnan(spurious_fraction(0.05, 0.0))
    # The prototype of the spec: D = .458, D_K = .098
    assert spurious_fraction(0.458, 0.098) == pytest.approx(0.79, abs=0.005)


@pytest.mark.parametrize(
    ("control", "samples", "holds"),
    [(0.02, 400, True), (0.039, 400, True), (0.06, 400, False), (0.06, 40, True), (0.0, 1, True)],
)
def test_the_control_may_exceed_chance_by_three_deviations(control, samples, holds):
    assert at_chance(control, 0.02, samples) is holds


# -- dynamics ---------------


def test_dynamics_of_a_curve_by_hand():
    found = dynamics([0, 5, 10, 20, 50], [0.8, 0.6, 0.4, 0.1, 0.2], [0, 0.5, 1.0, 2.0, 5.0])
    assert found == {
        "steps_to_half": 10,
        "rate_to_half": 1.0,
        "trough": 0.1,
        "rebound": pytest.approx(0.1),
    }
    kept = dynamics([0, 5], [0.8, 0.7], [0, 1])
    assert math.isnan(kept["steps_to_half"])
    assert math.isnan(kept["rate_to_half"])
    assert all(math.isnan(v) for v in dynamics([0, 5], [0.0, 0.3], [0, 1]).values())


@given(st.lists(scores, min_size=1, max_size=8))
def test_trough_and_rebound_bound_the_end(curve):
    found = dynamics(range(len(curve)), curve, range(len(curve)))
    if curve[0] > 0:
        assert found["trough"] + found["rebound"] == pytest.approx(curve[-1])
        assert found["rebound"] >= 0


def test_strategies_are_matched_where_the_new_task_is_learned():
    assert matched([0.9, 0.5, 0.2], [0.0, 0.98, 1.0], 0.98) == 1
    assert matched([0.9, 0.5], [0.0, 0.5], 0.98) is None
    with pytest.raises(ValueError, match="2 old scores"):
        matched([0.9, 0.5], [0.0], 0.98)


# -- the plane of a loss landscape ---------------


def three(seed):
    return [
        {"w": normal(seed + i, 4, 3).float(), "b": normal(seed + 9 + i, 4).float()}
        for i in (0, 1, 2)
    ]


@given(seeds, st.floats(-1, 2), st.floats(-1, 2))
def test_the_plane_goes_through_its_corners_and_projects_onto_itself(seed, a, b):
    corners = three(seed)
    for place, corner in zip(((0, 0), (1, 0), (1, 1)), corners, strict=True):
        found = at(*corners, *map(float, place))
        assert all(torch.equal(found[n], corner[n]) for n in corner)
    assert project(*corners, at(*corners, a, b)) == pytest.approx((a, b), abs=1e-3)


def test_directions_are_described_because_they_are_not_orthonormal():
    origin = {"w": torch.zeros(2)}
    found = describe_plane(origin, {"w": torch.tensor([3.0, 0])}, {"w": torch.tensor([3.0, 4])})
    assert found == {"u_norm": 3, "v_norm": 4, "cosine": 0}
    assert math.isnan(describe_plane(origin, origin, {"w": torch.ones(2)})["cosine"])
    assert math.isnan(project(origin, origin, {"w": torch.ones(2)}, origin)[0])


# -- what theory promises (spec, section 2.2) ---------------


def residual(weights, X, changes=None):
    """Hidden states of X_l = (W_l + dW_l + I) X_{l-1}."""
    states = [X]
    for i, W in enumerate(weights):
        dW = changes[i] if changes else 0
        states.append(states[-1] + (W + dW) @ states[-1])
    return states


def scaled(matrix, norm):
    return matrix * norm / torch.linalg.matrix_norm(matrix, 2)


@pytest.mark.parametrize("frozen", [0, 2, 6])
@given(seed=seeds)
def test_shift_telescopes_and_is_bounded_by_what_is_not_frozen(frozen, seed):
    L, d, delta, eps = 6, 8, 0.2, 0.05
    W = [scaled(normal(seed + i, d, d), delta) for i in range(L)]
    dW = [scaled(normal(seed + 50 + i, d, d), eps) * (i >= frozen) for i in range(L)]
    X = normal(seed + 99, d, 10)
    before, after = residual(W, X), residual(W, X, dW)
    shift = torch.zeros_like(X)
    eye = torch.eye(d, dtype=torch.float64)
    for layer in range(L):  # T1
        carried = dW[layer] @ before[layer]
        for above in range(layer + 1, L):
            carried = (eye + W[above] + dW[above]) @ carried
        shift += carried
    assert torch.allclose(after[-1] - before[-1], shift, atol=1e-12)

    def bound(n):  # T2
        grown = (1 + delta + eps) ** (L - n) - (1 + delta) ** (L - n)
        return (1 + delta) ** n * grown * float(torch.linalg.matrix_norm(X, 2))

    assert float(torch.linalg.matrix_norm(after[-1] - before[-1], 2)) <= bound(frozen) + 1e-12
    assert all(bound(n) > bound(n + 1) for n in range(L))
    assert bound(L) == 0


def test_orthogonal_updates_add_orthogonally_but_not_to_the_residual_stream():
    W, dW, X = normal(0, 6, 6), normal(1, 6, 6), normal(2, 6, 20)
    W[3:], dW[:3] = 0, 0
    assert float((W.t() @ dW).abs().max()) == 0
    assert float(((W @ X) * (dW @ X)).sum()) == pytest.approx(0, abs=1e-12)  # T3
    assert abs(float((X * (dW @ X)).sum())) > 0.1
