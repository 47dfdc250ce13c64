"""Random models in double precision."""

import torch
from hypothesis import strategies as st

from cl_bench.merging import Folded, fold

SHAPES = {"first": (7, 5), "second": (4, 9), "square": (6, 6), "bias": (7,), "norm": (5,)}
MATRICES = {"first", "second", "square"}

seeds = st.integers(0, 2**31)
counts = st.integers(1, 5)


def model(seed, shapes=SHAPES, size=1.0):
    rng = torch.Generator().manual_seed(seed)
    return {
        name: size * torch.randn(shape, generator=rng, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def task_vectors(seed, count, shapes=SHAPES):
    return [model(seed + 97 * t + 1, shapes, 1 + 0.5 * t) for t in range(count)]


def folded_over(rule, vectors, moments=None, matrices=MATRICES):
    folded = Folded()
    for i, deltas in enumerate(vectors):
        folded = fold(rule, folded, deltas, matrices, moments[i] if moments else None)
    return folded


def flat(weights):
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


def close(found, wanted, atol=1e-12):
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(
            found[name].reshape(wanted[name].shape), wanted[name], atol=atol, rtol=1e-12, msg=name
        )
