"""Three steps of every rule of our own, against its formula written out here."""

import functools
import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from cl_bench.optimizers.adamuon import AdaMuon
from cl_bench.optimizers.dct_adam import DCTAdam, cosines
from cl_bench.optimizers.dion import Dion
from cl_bench.optimizers.lmo import LMO, oracle
from cl_bench.optimizers.lookahead import Lookahead
from cl_bench.optimizers.online_subspace import OnlineSubspace
from cl_bench.optimizers.orthogonal import newton_schulz, polar
from cl_bench.optimizers.random_scaling import RandomScaling

STEPS = 3


def matrix(*shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def stepped(factory, shape=(7, 4), steps=STEPS):
    """The weight after some steps on gradients that depend on nothing."""
    weight = nn.Parameter(matrix(*shape))
    optimizer = factory([{"params": [weight]}])
    for t in range(steps):
        weight.grad = matrix(*shape, seed=t + 1)
        optimizer.step()
    return weight.detach()


def gradients(shape=(7, 4), steps=STEPS):
    return [matrix(*shape, seed=t + 1) for t in range(steps)]


def quintic(M):
    """Muon's iteration from the singular values: each goes through the polynomial five times."""
    U, s, Vh = torch.linalg.svd(M, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return U @ torch.diag(s) @ Vh


def by_svd(M):
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    return U @ Vh


ORACLES = {
    "frobenius": lambda M: M / M.square().sum().sqrt(),
    "max": torch.sign,
    "spectral": by_svd,
    "newton_schulz": quintic,
    "row": lambda M: torch.stack([row / row.norm() for row in M]),
    "column": lambda M: torch.stack([column / column.norm() for column in M.t()]).t(),
}


@pytest.mark.parametrize("norm", ORACLES)
@pytest.mark.parametrize("shape", [(7, 4), (4, 7)])
def test_steepest_descent_in_a_norm(norm, shape):
    W, M = matrix(*shape), torch.zeros(shape, dtype=torch.float64)
    for G in gradients(shape):
        M = 0.9 * M + 0.1 * G
        W = (1 - 0.05 * 0.1) * W - 0.05 * ORACLES[norm](M)
    made = stepped(functools.partial(LMO, lr=0.05, norm=norm, weight_decay=0.1), shape)
    assert torch.allclose(made, W, atol=1e-6)


def test_an_oracle_is_the_best_of_its_ball():
    """No other direction of its length has a larger product with M; those of other norms do not."""
    M = matrix(5, 5)
    norms = {
        "frobenius": lambda D: D.norm(),
        "max": lambda D: D.abs().max(),
        "spectral": lambda D: torch.linalg.matrix_norm(D, 2),
        "row": lambda D: D.norm(dim=1).max(),
        "column": lambda D: D.norm(dim=0).max(),
    }
    for name, norm in norms.items():
        best = oracle(M, name)
        assert float(norm(best)) == pytest.approx(1)
        others = [matrix(5, 5, seed=s) for s in range(50)] + [oracle(M, n) for n in norms]
        assert all((M * D).sum() / norm(D) <= (M * best).sum() + 1e-9 for D in others)


def test_the_polar_factor_is_silent_where_the_matrix_is():
    """An SVD's vectors of zero are arbitrary: a projected gradient's would leave its subspace."""
    M, S = matrix(6, 5), torch.linalg.qr(matrix(5, 2, seed=3)).Q
    inside = (M - M @ S @ S.t()).float()
    assert (polar(inside) @ S.float()).norm() < 1e-5
    assert (by_svd(inside) @ S.float()).norm() > 0.5  # the negative control
    assert torch.linalg.matrix_rank(polar(inside)) == 3


def test_five_steps_orthogonalise_roughly_and_whatever_the_scale():
    M = torch.eye(8) + 0.2 * matrix(8, 8).float()
    values = torch.linalg.svdvals(newton_schulz(M))
    assert values.min() > 0.65
    assert values.max() < 1.2
    assert torch.allclose(newton_schulz(1e-4 * M), newton_schulz(M), atol=1e-5)


def test_auon_is_normalised_sgd_with_momentum():
    M = matrix(16, 12)
    unit = M / M.norm()
    auon = unit / unit.cosh().square().mean().sqrt()
    assert (auon / oracle(M, "frobenius") - 1).abs().max() < math.sinh(1) ** 2 / (2 * M.numel())


@pytest.mark.parametrize("sign", [True, False])
def test_adamuon(sign):
    W = matrix(7, 4)
    M = V = torch.zeros(7, 4, dtype=torch.float64)
    for t, G in enumerate(gradients(), 1):
        M = 0.9 * M + 0.1 * G
        O = quintic(M.sign() if sign else M)  # noqa: E741
        V = 0.8 * V + 0.2 * O**2
        U = O / ((V / (1 - 0.8**t)).sqrt() + 1e-8)
        W = W - 0.01 * 0.2 * math.sqrt(28) * U / U.norm()
    made = stepped(functools.partial(AdaMuon, lr=0.01, betas=(0.9, 0.8), sign=sign))
    assert torch.allclose(made, W, atol=1e-6)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7)])
def test_dion(shape):
    m, n = shape
    torch.manual_seed(5)
    Q = torch.randn(n, 2, dtype=torch.float64)
    W, M = matrix(*shape), torch.zeros(shape, dtype=torch.float64)
    for G in gradients(shape):
        M = M + G
        P = torch.linalg.qr(M @ Q)[0]
        R = M.t() @ P
        M = M - 0.1 * P @ R.t()
        Q = R / R.norm(dim=0)
        W = W - 0.05 * math.sqrt(m / n) * P @ Q.t()
    torch.manual_seed(5)
    made = stepped(functools.partial(Dion, lr=0.05, rank=2, momentum=0.9), shape)
    assert torch.allclose(made, W, atol=1e-6)


def test_random_scaling_draws_one_number_a_step():
    torch.manual_seed(7)
    W, M = matrix(7, 4), torch.zeros(7, 4, dtype=torch.float64)
    for G in gradients():
        M = 0.9 * M + G
        W = W - 0.1 * float(torch.empty((), dtype=torch.float64).exponential_()) * M
    torch.manual_seed(7)
    scaled = functools.partial(RandomScaling, lr=0.1)
    assert torch.allclose(stepped(scaled), W, atol=1e-6)
    two = [nn.Parameter(torch.zeros(3)) for _ in range(2)]
    for parameter in two:
        parameter.grad = torch.ones(3)
    scaled([{"params": [two[0]]}, {"params": [two[1]]}]).step()
    assert torch.equal(*two)


def test_random_scaling_is_sgdm_in_the_mean():
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = RandomScaling([weight], lr=1.0, momentum=0.0)
    torch.manual_seed(0)
    for _ in range(3000):
        weight.grad = torch.ones(1, dtype=torch.float64)
        optimizer.step()
    assert -float(weight.detach()) / 3000 == pytest.approx(1, abs=0.06)


def adam(moments, G, t, first=0.9, second=0.999):
    m, v = first * moments[0] + (1 - first) * G, second * moments[1] + (1 - second) * G**2
    return (m, v), (m / (1 - first**t)) / ((v / (1 - second**t)).sqrt() + 1e-8)


@pytest.mark.parametrize("subspace", ["sgd", "adamw"])
@pytest.mark.parametrize("shape", [(7, 4), (4, 7)])
def test_online_subspace_descent(subspace, shape):
    """P's gradient is autograd's, of the distance that it is to make smaller."""
    W, zeros = matrix(7, 4), (0.0, 0.0)
    W = matrix(*shape) if shape == (7, 4) else matrix(*shape).t()
    inside, outside, P = zeros, zeros, None
    for t, given in enumerate(gradients(shape), 1):
        G = given if shape == (7, 4) else given.t()
        if P is None:
            P = torch.linalg.svd(G, full_matrices=False)[2][:2].t()
        inside, step = adam(inside, G @ P, t)
        unit, variable = G / G.norm(), P.clone().requires_grad_()
        (unit - unit @ variable @ variable.t()).square().sum().backward()
        W = W - 0.1 * step @ P.t()
        if subspace == "sgd":
            P = P - variable.grad / 20
        else:
            outside, downhill = adam(outside, variable.grad, t)
            P = (1 - 0.01 / 20) * P - downhill / 20
    made = stepped(
        functools.partial(OnlineSubspace, lr=0.1, rank=2, gap=20, subspace=subspace), shape
    )
    assert torch.allclose(made if shape == (7, 4) else made.t(), W, atol=1e-6)


@pytest.mark.parametrize("gap", [1, 2])
def test_adam_in_columns_of_the_cosine_transform(gap):
    """Moments of a column that is left out are gone; those of one that stays go on."""
    middle = (torch.arange(4).double() + 0.5) / 4
    D = torch.stack([torch.cos(math.pi * k * middle) for k in range(4)], 1)
    D = D / D.norm(dim=0)
    assert torch.allclose(cosines(4), D)
    assert torch.allclose(D.t() @ D, torch.eye(4).double())
    W, chosen, moments = matrix(7, 4), [], {}
    for t, G in enumerate(gradients(), 1):
        S = G @ D
        if (t - 1) % gap == 0:
            chosen = sorted(range(4), key=lambda k: -S[:, k].norm())[:2]
            moments = {k: moments.get(k, (0.0, 0.0)) for k in chosen}
        step = torch.zeros(7, 4, dtype=torch.float64)
        for k in chosen:
            moments[k], column = adam(moments[k], S[:, k], t)
            step[:, k] = column
        W = W - 0.1 * step @ D.t()
    made = stepped(functools.partial(DCTAdam, lr=0.1, rank=2, gap=gap))
    assert torch.allclose(made, W, atol=1e-6)


def test_lookahead_returns_part_of_the_way():
    W = slow = matrix(7, 4)
    for t, G in enumerate(gradients(), 1):
        W = W - 0.1 * G
        if t % 2 == 0:
            W = slow = slow + 0.3 * (W - slow)
    lookahead = functools.partial(Lookahead, inner=SGD, lr=0.1, k=2, alpha=0.3)
    assert torch.allclose(stepped(lookahead), W, atol=1e-6)


def test_lookahead_that_goes_all_the_way_is_what_is_inside():
    whole = functools.partial(Lookahead, inner=Adam, lr=0.1, k=2, alpha=1.0)
    assert torch.allclose(
        stepped(whole, steps=5), stepped(functools.partial(Adam, lr=0.1), steps=5)
    )


def test_a_kernel_is_stepped_as_its_matrix():
    kernel = nn.Parameter(matrix(6, 2, 3, 3))
    kernel.grad = matrix(6, 2, 3, 3, seed=1)
    begun = kernel.detach().clone()
    LMO([kernel], lr=0.5, momentum=0.0, norm="spectral").step()
    expected = begun.flatten(1) - 0.5 * by_svd(kernel.grad.flatten(1))
    assert torch.allclose(kernel.detach().flatten(1), expected)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (functools.partial(Dion, rank=0), "rank=0"),
        (functools.partial(DCTAdam, gap=0), "gap=0"),
        (functools.partial(OnlineSubspace, rank=0), "rank=0"),
        (functools.partial(Lookahead, inner=SGD, lr=0.1, k=0), "k=0"),
    ],
)
def test_what_makes_no_rule_is_refused(made, message):
    with pytest.raises(ValueError, match=message):
        made([nn.Parameter(torch.zeros(2, 2))])
