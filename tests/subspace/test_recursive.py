"""Recursive least squares is weighted ridge regression, whatever comes in whatever pieces."""

import pytest
import torch

from cl_bench.subspace import RecursiveLeastSquares

N, D, C = 60, 7, 3


@pytest.fixture(scope="module")
def rows():
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(N, D, generator=rng, dtype=torch.float64)
    return z, torch.randn(N, C, generator=rng, dtype=torch.float64)


def ridge(z, y, weights, penalty):
    gram = z.t() @ (weights[:, None] * z) + penalty * torch.eye(z.shape[1], dtype=z.dtype)
    return torch.linalg.solve(gram, z.t() @ (weights[:, None] * y))


def learned(z, y, sizes, **options):
    solver = RecursiveLeastSquares(D, C, 0.1, **options)
    for part in zip(z.split(sizes), y.split(sizes), strict=True):
        solver.learn(*part)
    return solver


@pytest.mark.parametrize("forgetting", [1.0, 0.98])
@pytest.mark.parametrize("sizes", [1, 7, N])
def test_it_is_the_weighted_batch_ridge(rows, forgetting, sizes):
    z, y = rows
    solver = learned(z, y, sizes, forgetting=forgetting)
    weights = forgetting ** torch.arange(N - 1, -1, -1, dtype=torch.float64)
    wanted = ridge(z, y, weights, 0.1 * forgetting**N)
    torch.testing.assert_close(solver.beta, wanted, rtol=0, atol=1e-10)


def test_it_is_the_published_form_while_that_lasts(rows):
    """sum theta^(2t) |y - z beta|^2 + rho |beta|^2, by the authors' recursion."""
    z, y = rows
    theta, rho = 1.003, 0.1
    P, Q = torch.eye(D).double() / rho, torch.zeros(D, C).double()
    for t in range(N):
        a, row = theta ** (2 * (t + 1)), z[t : t + 1]
        Pz = P @ row.t()
        P = P - a * Pz @ Pz.t() / (1 + a * row @ Pz)
        Q = Q + a * row.t() @ y[t : t + 1]
    solver = learned(z, y, 1, forgetting=theta**-2)
    torch.testing.assert_close(solver.beta, P @ Q, rtol=0, atol=1e-12)


def test_rows_are_forgotten_as_if_they_had_never_come(rows):
    z, y = rows
    solver = learned(z, y, 10)
    whole = solver.beta
    solver.forget(z[20:25], y[20:25])
    kept = torch.cat([z[:20], z[25:]]), torch.cat([y[:20], y[25:]])
    ones = torch.ones(N - 5, dtype=torch.float64)
    torch.testing.assert_close(solver.beta, ridge(*kept, ones, 0.1), rtol=0, atol=1e-10)
    solver.learn(z[20:25], y[20:25])
    torch.testing.assert_close(solver.beta, whole, rtol=0, atol=1e-10)


def test_leakage_keeps_directions_bounded_that_nothing_excites():
    z = torch.zeros(4000, D, dtype=torch.float64)
    z[:, 0] = torch.randn(4000, generator=torch.Generator().manual_seed(1)).double()
    y = z[:, :1].expand(-1, C)
    winding = learned(z, y, 50, forgetting=0.98)
    leaking = learned(z, y, 50, forgetting=0.98, leakage=True)
    assert float(winding.R.trace()) > 1e30  # the negative control
    assert float(leaking.R.trace()) < 10 * D / 0.1
    assert float((leaking.beta[0] - 1).abs().max()) < 0.05


def test_more_outputs_were_zero_so_far(rows):
    z, y = rows
    narrow = RecursiveLeastSquares(D, 2, 0.1)
    narrow.learn(z[:30], y[:30, :2])
    narrow.widen(C)
    narrow.learn(z[30:], y[30:])
    padded = y.clone()
    padded[:30, 2] = 0
    torch.testing.assert_close(narrow.beta, learned(z, padded, 6).beta, rtol=0, atol=1e-10)
