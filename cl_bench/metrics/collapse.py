"""What becomes of a model that learns from its own labels: closed forms of iterated regression.

Dohmatob, Feng & Kempe, "Model collapse demystified: the case of regression". Generation n fits
w_n on T fresh Gaussian inputs in d dimensions, labelled by w_(n-1) with noise of deviation s; w_0
is the truth. These are oracles: what a stream of generations is compared with.
"""

import torch
from torch import Tensor

from cl_bench.contracts import generator


def expected_error(generations: int, samples: int, dims: int, noise: float) -> float:
    """E|w_n - w_0|^2 = n s^2 d / (T - d - 1) by least squares: it grows with every generation.

    Raises:
        ValueError: with at most d + 1 samples there is no such mean.
    """
    if samples <= dims + 1:
        raise ValueError(f"{samples} samples in {dims} dimensions: needs more than {dims + 1}")
    return generations * noise**2 * dims / (samples - dims - 1)


def shrinkage(generations: int, samples: int, ridge: float) -> float:
    """E w_n over w_0 by ridge regression, to first order: (T / (T + lambda))^n."""
    return (samples / (samples + ridge)) ** generations


def kept_error(generations: int, samples: int, dims: int, noise: float) -> float:
    """E|w_n - w_0|^2 where every generation fits all data so far: about s^2 d / T sum 1 / i^2.

    Bounded by pi^2 / 6 s^2 d / T, however many generations.
    """
    return noise**2 * dims / samples * sum(1 / i**2 for i in range(1, generations + 1))


def iterated_regression(
    truth: Tensor,
    generations: int,
    samples: int,
    noise: float,
    ridge: float = 0.0,
    keep: bool = False,
    seed: int = 0,
    runs: int = 1,
) -> Tensor:
    """w_0, w_1, ... of so many runs side by side (runs, generations + 1, d): the process itself.

    Args:
        truth: w_0 (d,).
        generations: n.
        samples: T of each.
        noise: s.
        ridge: lambda.
        keep: fit all data so far, and not the latest alone.
        seed: of inputs and noise.
        runs: how many.
    """
    rng, d = generator(seed, "generations"), len(truth)
    found = [truth.double().expand(runs, d)]
    none = ridge * torch.eye(d, dtype=torch.float64), torch.zeros(runs, d, dtype=torch.float64)
    gram, total = none
    for _ in range(generations):
        x = torch.randn(runs, samples, d, generator=rng, dtype=torch.float64)
        drawn = noise * torch.randn(runs, samples, generator=rng, dtype=torch.float64)
        y = (x @ found[-1][:, :, None])[:, :, 0] + drawn
        if not keep:
            gram, total = none
        gram, total = gram + x.mT @ x, total + (x.mT @ y[:, :, None])[:, :, 0]
        found.append(torch.linalg.solve(gram, total))
    return torch.stack(found, 1)
