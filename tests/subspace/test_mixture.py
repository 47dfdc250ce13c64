"""Mixtures that learn sample by sample: exact covariances, conditional means, published rule."""

import pytest
import torch

from cl_bench.subspace import Mixture

D = 4


def samples(n, seed=0):
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(D, D, generator=rng, dtype=torch.float64)
    return torch.randn(n, D, generator=rng, dtype=torch.float64) @ mixing


def single(x, variance, rule="exact"):
    """One component that all samples move."""
    mixture = Mixture(D, rule)
    mixture.create(x[0], torch.full((D,), variance, dtype=torch.float64))
    for row in x[1:]:
        mixture.learn(row)
    return mixture


def test_one_component_is_the_covariance_of_all_samples_and_its_prior():
    x = samples(200)
    mixture = single(x, 0.25)
    wanted = x.t().cov(correction=0) + 0.25 / 200 * torch.eye(D).double()
    torch.testing.assert_close(mixture.mean[0], x.mean(0), rtol=0, atol=1e-10)
    torch.testing.assert_close(mixture.precision[0].inverse(), wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_precision_is_the_inverse_covariance_and_its_determinant_with_samples_however_far(scale):
    mixture, x = Mixture(D), scale * samples(300, 2)
    ones = torch.ones(D, dtype=torch.float64)
    for centre in x[:3]:
        mixture.create(centre, ones)
    covariances = torch.eye(D).double().repeat(3, 1, 1)
    for row in x[3:]:
        posterior = (-(mixture.distances(row) + mixture.logdet) / 2 + mixture.mass.log()).softmax(0)
        w, e = posterior / (mixture.mass + posterior), row - mixture.mean
        spread = w[:, None, None] * e[:, :, None] * e[:, None]
        covariances = (1 - w)[:, None, None] * (covariances + spread)
        mixture.learn(row)
    unit = mixture.precision @ covariances
    assert float((unit - torch.eye(D).double()).abs().max()) < 1e-8
    assert float(torch.linalg.eigvalsh(mixture.precision).min()) > 0
    torch.testing.assert_close(mixture.logdet, torch.linalg.slogdet(covariances)[1])


def test_the_published_rule_is_its_formula_and_loses_definiteness():
    first, far = torch.zeros(D).double(), torch.tensor([5.0, 0, 0, 0], dtype=torch.float64)
    published = single(torch.stack([first, far]), 1.0, "published")
    w = 0.5
    after = far - w * far
    eye = torch.eye(D).double()
    wanted = (1 - w) * eye + w * after.outer(after) - w * w * far.outer(far)
    torch.testing.assert_close(published.precision[0].inverse(), wanted)
    assert float(torch.linalg.eigvalsh(wanted).min()) < 0
    exact = single(torch.stack([first, far]), 1.0)
    assert float(torch.linalg.eigvalsh(exact.precision[0]).min()) > 0


def test_regression_is_the_conditional_mean_in_closed_form():
    x = samples(100, 3)
    mixture = Mixture(D)
    ones = torch.ones(D, dtype=torch.float64)
    for centre in x[:2]:
        mixture.create(centre, ones)
    for row in x[2:]:
        mixture.learn(row)
    a, parts, densities = x[:5, :3], [], []
    for mean, precision, mass in zip(mixture.mean, mixture.precision, mixture.mass, strict=True):
        C = precision.inverse()
        gain = C[3:, :3] @ C[:3, :3].inverse()
        parts.append(mean[3:] + (a - mean[:3]) @ gain.t())
        marginal = torch.distributions.MultivariateNormal(mean[:3], C[:3, :3])
        densities.append(mass.log() + marginal.log_prob(a))
    share = torch.stack(densities).softmax(0)[:, :, None]
    torch.testing.assert_close(mixture.regress(a), (share * torch.stack(parts)).sum(0))
    even = Mixture(D)
    even.load_state_dict({**mixture.state_dict(), "mass": torch.ones(2, dtype=torch.float64)})
    torch.testing.assert_close(mixture.regress(a, priors=False), even.regress(a))


def test_new_dimensions_are_independent_of_the_others():
    mixture = single(samples(50, 4), 1.0)
    before = mixture.regress(samples(3, 5)[:, :3])
    mixture.widen(torch.tensor([0.25], dtype=torch.float64))
    torch.testing.assert_close(mixture.regress(samples(3, 5)[:, :3])[:, :1], before)
    torch.testing.assert_close(mixture.logdet, -torch.linalg.slogdet(mixture.precision)[1])
