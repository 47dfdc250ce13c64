"""What starts from data see of a task: gradients of the weights that adapters stand for."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cl_bench.contracts import Batch, Learner, Task, split_batch
from cl_bench.contracts.learner import Of
from cl_bench.subspace import LinearMap

PIECE = 32
"""Samples at a time."""


def pieces(learner: Learner, task: Task, samples: int) -> Iterator[Batch]:
    """``samples`` of the task's training data, drawn from the learner's seed, some at a time."""
    yield from split_batch(task.sample(samples, learner.seed), PIECE, learner.least_batch)


def mean_gradients(
    learner: Learner,
    task: Task,
    maps: Sequence[LinearMap],
    samples: int,
    squared: bool,
    of: Of = "loss",
) -> dict[str, Tensor]:
    """Of every layer's matrix (o, d): the mean gradient, or the mean of single samples' squares.

    The second is the empirical Fisher information's diagonal.
    """
    names = {id(p): name for name, p in learner.network.named_parameters()}
    own = {m.name: names[id(m.weight)] for m in maps}
    frozen = [m.weight for m in maps if not m.weight.requires_grad]
    total: dict[str, Tensor] = {}
    count = 0
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        for batch in pieces(learner, task, samples):
            n = len(next(iter(batch.values())))
            gradients = learner.gradients(batch, of, per_sample="squares" if squared else False)
            for m in maps:
                part = gradients[own[m.name]] * (1 if squared else n)
                total[m.name] = total[m.name] + part if m.name in total else part
            count += n
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
    return {m.name: m.matrix(total[m.name] / count, None) for m in maps}


def largest(scores: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """Places int64 (k,) of the ``count`` largest entries of all matrices together, by layer."""
    flat = torch.cat([s.flatten() for s in scores.values()])
    chosen = flat.topk(count).indices.sort().values
    found, start = {}, 0
    for name, score in scores.items():
        end = start + score.numel()
        found[name] = chosen[(chosen >= start) & (chosen < end)] - start
        start = end
    return found
