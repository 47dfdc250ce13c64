"""Adaptive SVD on small networks, and what tests of it measure."""

import functools

from torch.optim import SGD, Adafactor, Adam, AdamW
from toys import make_learner, make_stream, mlp

from cl_bench.subspace import spectra

OPTIMIZERS = {
    "sgd": functools.partial(SGD, lr=0.05),
    "momentum": functools.partial(SGD, lr=0.02, momentum=0.9, nesterov=True),
    "adam": functools.partial(Adam, lr=1e-2),
    "adamw": functools.partial(AdamW, lr=1e-2, weight_decay=0.1),
    "adafactor": functools.partial(Adafactor, lr=0.3),
}


def half(**options):
    return {"schedule": "fixed", "preserve_ratio": 0.5} | options


def make(optimizer="adam", hidden=(24, 24, 8), bias=False):
    """A learner with a tall, a square and a wide matrix."""
    stream = make_stream()
    factory = OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer
    return stream, make_learner(stream, mlp(bias, hidden), factory)


def split_of(W, k, low=True):
    ((_, spectrum),) = spectra([W])
    return spectrum.split(k, low=low)


def touching(split, D):
    """Shares of ||D|| that touch U_h from the left, and V_h from the right."""
    left, right = (split.U_h.t() @ D).norm(), (D @ split.V_h).norm()
    return float(left / D.norm()), float(right / D.norm())
