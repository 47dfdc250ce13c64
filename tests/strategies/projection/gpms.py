"""GPM on small networks, and what tests of it measure."""

import functools
import types

import torch
from torch.optim import SGD, Adam, AdamW, RMSprop
from toys import DIM, IMAGE, cnn, make_learner, make_stream, mlp

from cl_bench.subspace import Moments

WIDE = 20
sgd = functools.partial(SGD, lr=0.05)
OPTIMIZERS = {
    "SGD": functools.partial(SGD, lr=0.2),
    "momentum": functools.partial(SGD, lr=0.02, momentum=0.9),
    "Nesterov": functools.partial(SGD, lr=0.02, momentum=0.9, nesterov=True),
    "weight decay": functools.partial(SGD, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "Adam": functools.partial(Adam, lr=0.005),
    "AdamW": functools.partial(AdamW, lr=0.005, weight_decay=0.05),
    "RMSprop": functools.partial(RMSprop, lr=0.002),
}
NETWORKS = {
    "mlp": (mlp, (DIM,), 5),
    "mlp with biases": (functools.partial(mlp, bias=True), (DIM,), 5),
    "cnn": (cnn, IMAGE, 12),
}


def setting(network, optimizer=None, **stream_options):
    make, shape, subspace = NETWORKS[network]
    stream = make_stream(shape=shape, subspace=subspace, **stream_options)
    return stream, make_learner(stream, make(), optimizer or sgd)


def matrices(learner, protect):
    with torch.no_grad():
        return {
            layer.name: layer.matrix(layer.weight, layer.bias).clone()
            for layer in learner.layers(protect)
        }


def leaks(learner, gpm, before, memory):
    """|dW M| / |dW| of every layer, and |dW|."""
    found = {}
    for name, after in matrices(learner, gpm.protect).items():
        change = (after - before[name]).double()
        size = float(change.norm())
        found[name] = (float((change @ memory[name]).norm()) / max(size, 1e-300), size)
    return found


def consolidate(gpm, R, index=0):
    """Feed inputs R (d x n) of one layer to the memory, as task ``index``."""
    moments = Moments(len(R))
    moments.add(R.t(), samples=R.shape[1])
    gpm.consolidate(None, types.SimpleNamespace(index=index), {"l": moments})
    return gpm.memory["l"]
