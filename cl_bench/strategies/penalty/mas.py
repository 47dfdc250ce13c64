"""Memory Aware Synapses (Aljundi et al., ECCV 2018).

A weight is as important as the outputs are sensitive to it: with f the network's outputs,

    Omega_i += mean_k |d ||f(x_k)||^2 / d theta_i|,
    L = L_t + lambda sum_i Omega_i (theta_i - theta*_i)^2.

No labels are needed. The rule follows the paper's text; we have not checked equation numbers.
"""

import torch
from torch import Tensor

from cl_bench.contracts import (
    CLASSIFIED,
    LOCAL_OR_FEDERATED,
    Batch,
    Learner,
    Needs,
    Statistics,
    Task,
    held_at_once,
    split_batch,
)
from cl_bench.contracts.options import Count, Strength
from cl_bench.strategies.penalty.quadratic import Quadratic

PIECE = 64
"""Samples whose gradients are in memory at once."""


class MAS(Quadratic):
    """Pulls weights back by how much the outputs depend on them.

    The outputs are the logits that the network gives: of the task's own classes where the task id
    is known, else of all classes seen.

    Args:
        strength: lambda.
        samples: training samples that estimate the importance of a task.
        mean_of: samples whose mean gradient the absolute value is taken of: 1 is the paper's rule,
            much code takes whole batches. GT-RIPL/Continual-Learning-Benchmark, which also takes
            the mean over the classes, takes 128.
    """

    needs = Needs(engines=LOCAL_OR_FEDERATED, shardable=False, modalities=CLASSIFIED)

    def __init__(self, strength: Strength = 1.0, samples: Count = 1000, mean_of: Count = 1) -> None:
        super().__init__(strength)
        self.samples = samples
        self.mean_of = mean_of

    def collect(self, learner: Learner, task: Task) -> Statistics:
        """Sum over samples of |d ||f||^2 / d theta|, and their number."""
        batch = task.sample(self.samples, learner.seed)
        total: dict[str, Tensor] = {"samples": torch.tensor(float(len(batch["y"])))}
        single = self.mean_of == 1
        weights = sum(p.numel() for p in learner.trainable_parameters())
        few = PIECE if learner.least_batch > 1 else held_at_once(weights, PIECE)
        for piece in split_batch(batch, few if single else self.mean_of, learner.least_batch):
            found = learner.gradients(piece, of=squared_norm, per_sample=single)
            for name, gradient in found.items():
                size = gradient.abs().sum(0) if single else gradient.abs() * len(piece["y"])
                total[name] = total[name] + size if name in total else size
        return total

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """Omega <- Omega + Omega_t, theta* <- the weights."""
        count = stats["samples"]
        self.remember(learner, {n: v / count for n, v in stats.items() if n != "samples"})  # type: ignore[operator]


def squared_norm(out: Tensor, batch: Batch) -> Tensor:
    """Mean of ||f(x)||^2 over the batch; classes that are left out do not count."""
    return out.masked_fill(~out.isfinite(), 0.0).square().sum(1).mean()
