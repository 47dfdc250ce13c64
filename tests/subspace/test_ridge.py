"""Ridge regression from sums, against the samples themselves."""

import pytest
import torch

from cl_bench.subspace import Sums, add_gram, block_rows, chosen, solve_ridge
from cl_bench.subspace.ridge import held_out

DECADES = [10.0**k for k in range(-8, 9)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr("cl_bench.subspace.ridge.BLOCK", 7)


def samples(n, M=23, C=4, seed=0, noise=1.0):
    rng = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % C
    centres = torch.randn(C, M, generator=torch.Generator().manual_seed(99))
    H = centres[y] + noise * torch.randn(n, M, generator=rng)
    return H.double(), torch.nn.functional.one_hot(y, C).double()


def sums(H, Y):
    gram = torch.zeros(H.shape[1], H.shape[1], dtype=torch.float64)
    for h in torch.split(H, 11):
        add_gram(gram, h)
    return Sums(gram, H.t() @ Y, float(len(H)))


def test_the_blocks_hold_the_lower_triangle():
    H, Y = samples(50)
    torch.testing.assert_close(sums(H, Y).gram.tril(), (H.t() @ H).tril())
    kept = torch.zeros(23, 23)
    for rows, columns in block_rows(23):
        kept[rows, columns] += 1
    assert (kept.tril() == torch.ones(23, 23).tril()).all()


def test_the_solution_is_that_of_the_samples():
    H, Y = samples(50)
    W = solve_ridge(sums(H, Y), 0.3)
    augmented = torch.cat([H, 0.3**0.5 * torch.eye(23).double()])
    wanted = torch.linalg.lstsq(augmented, torch.cat([Y, torch.zeros(23, 4)])).solution
    torch.testing.assert_close(W, wanted, atol=1e-10, rtol=0)
    few = sums(*samples(5))
    assert solve_ridge(few, 1e-300) is None


def test_the_error_on_what_is_held_out_and_its_slope():
    (H, Y), (K, Z) = samples(40), samples(15, seed=1)
    for strength in (0.1, 30.0):
        error, slope = held_out(sums(H, Y), sums(K, Z), strength)
        wanted = [
            float((K @ solve_ridge(sums(H, Y), s) - Z).square().sum())
            for s in (strength, strength * (1 + 1e-6), strength * (1 - 1e-6))
        ]
        assert error == pytest.approx(wanted[0], abs=1e-9)
        assert slope == pytest.approx((wanted[1] - wanted[2]) / (2e-6 * strength), rel=1e-3)


@pytest.mark.parametrize("noise", [0.01, 0.5, 2.0, 20.0])
@pytest.mark.parametrize("n", [12, 40, 300])
def test_the_strength_is_the_best_of_all(n, noise):
    fit, held = sums(*samples(n, noise=noise)), sums(*samples(60, seed=1, noise=noise))
    errors = {s: held_out(fit, held, s)[0] for s in DECADES}
    assert chosen(fit, held, DECADES) == min(DECADES, key=lambda s: (errors[s], -s))


def test_where_nothing_is_held_out_the_scale_decides():
    fit = sums(*samples(40))
    nothing = Sums(fit.gram * 0, fit.cross * 0, 0.0)
    assert chosen(fit, nothing, DECADES) == 10.0 ** round(float(fit.gram.diagonal().mean().log10()))
