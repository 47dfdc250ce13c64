"""Small networks for strategies that keep a memory of subspaces, and what tests measure."""

import functools

import torch
from torch.optim import SGD, Adam, AdamW
from toys import DIM, IMAGE, cnn, make_engine, make_learner, make_stream, mlp, weights

from cl_bench.contracts import Plan, Protect
from cl_bench.strategies.projection.adam_nscl import AdamNSCL
from cl_bench.strategies.projection.rogo import ROGO
from cl_bench.strategies.projection.sgp import SGP
from cl_bench.strategies.projection.trgp import TRGP
from cl_bench.subspace import Moments

sgd = functools.partial(SGD, lr=0.05)
OPTIMIZERS = {
    "SGD": sgd,
    "momentum": functools.partial(SGD, lr=0.02, momentum=0.9),
    "weight decay": functools.partial(SGD, lr=0.02, momentum=0.9, weight_decay=1e-2),
    "Adam": functools.partial(Adam, lr=0.005),
    "AdamW": functools.partial(AdamW, lr=0.005, weight_decay=0.05),
}
NETWORKS = {
    "mlp": (mlp, (DIM,), 5),
    "mlp with biases": (functools.partial(mlp, bias=True), (DIM,), 5),
    "cnn": (cnn, IMAGE, 12),
}
CNN_THRESHOLD = {"backbone.0": 0.6, "*": 0.9}
"""The first layer's patches fill all dimensions soon."""


def setting(network="mlp", optimizer=sgd, **stream_options):
    make, shape, subspace = NETWORKS[network]
    stream = make_stream(shape=shape, **{"subspace": subspace, **stream_options})
    return stream, make_learner(stream, make(), optimizer)


def threshold(network, other=0.9):
    return CNN_THRESHOLD if network == "cnn" else other


def matrices(learner, protect=None):
    with torch.no_grad():
        return {
            layer.name: layer.matrix(layer.weight, layer.bias).double().clone()
            for layer in learner.layers(protect or Protect())
        }


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return all(torch.equal(a[name], b[name]) for name in a)


# -- what all of them keep: W does not move inside the memory --------------------------------------


def make(name, network="mlp", **options):
    if name == "adam_nscl":
        return AdamNSCL(**{"a": 20.0 if network == "cnn" else 200.0, **options})
    shared = {"threshold": threshold(network), "samples": 40}
    return {"sgp": SGP, "trgp": TRGP, "rogo": ROGO}[name](**{**shared, **options})


# -- SGP -------------------------------------------------------------------------------------------


def feed(strategy, R):
    moments = Moments(len(R))
    moments.add(R.t())
    strategy.remember("l", moments, strategy.threshold)


# -- ROGO ------------------------------------------------------------------------------------------


class Watching(ROGO):
    """Keeps the relaxed spaces beyond the end of the task."""

    def collect(self, learner, task):
        spaces = self.relaxed.spaces
        self.bases = {n: s.basis.double() for n, s in spaces.items()}
        self.changes = {n: s.change.detach().double() for n, s in spaces.items()}
        self.images = {n: s.image.double() for n, s in spaces.items()}
        self.left = dict(self.rest)
        return super().collect(learner, task)


def relaxed(network="mlp", optimizer=sgd, epochs=12, pack=1, **options):
    stream, _ = setting(network)
    learner = make_learner(stream, NETWORKS[network][0](), optimizer, pack=pack)
    options = {
        "threshold": {"backbone.0": 0.6, "*": 0.97} if network == "cnn" else 0.97,
        "cosine": 0.6,
        "strength": 0.02,
        "samples": 40,
        "relax_samples": 40,
        "rate_factor": 1.0,
        **options,
    }
    rogo = Watching(**options)
    engine = make_engine(learner, rogo, epochs=epochs, pack=pack)
    engine.learn(stream[0], Plan(stream[0].train))
    return stream, learner, rogo, engine


def moments_of(rows):
    moments = Moments(rows.shape[1])
    moments.add(rows)
    return moments


def assert_orthonormal(basis, tolerance=1e-5):
    gap = basis.t() @ basis - torch.eye(basis.shape[1], dtype=basis.dtype)
    assert float(gap.abs().max() if gap.numel() else 0) < tolerance
