"""GPM the way the published scripts compute it, to be timed against ours.

Same update rule and ranks as :class:`cl_bench.strategies.GPM`; only the arithmetic differs: a
dense d x d projector P = M M^T, built once a task, multiplies every gradient from the right; bases
come from numpy SVDs of the activations, two for each layer and task from the second task on (the
first only for the energy). Linear layers without biases, one shared head.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from cl_bench.contracts import Batch, Learner, Needs, Protect, Statistics, Strategy, Task


class Activations:
    """Layer inputs as they are, columns of R (d x n)."""

    def __init__(self, matrix: np.ndarray) -> None:
        self.matrix = matrix

    def __add__(self, other: "Activations") -> "Activations":
        return Activations(np.concatenate([self.matrix, other.matrix], axis=1))


def activations(learner: Learner, batch: Batch) -> dict[str, Activations]:
    """The inputs of every layer for one batch."""
    found: dict[str, Activations] = {}
    handles = []
    for layer in learner.layers(Protect()):

        def keep(module: object, args: tuple[Tensor], name: str = layer.name) -> None:
            found[name] = Activations(args[0].detach().numpy().T.copy())

        handles.append(layer.module.register_forward_pre_hook(keep))
    with torch.no_grad():
        learner(batch)
    for handle in handles:
        handle.remove()
    return found


def published_update(M: np.ndarray | None, R: np.ndarray, eps: float) -> np.ndarray:
    """The published rule: SVD of R, or of R - M M^T R."""
    if M is None:
        U, S, _ = np.linalg.svd(R, full_matrices=False)
        share = np.cumsum(S**2) / (S**2).sum()
        return U[:, : int((share < eps).sum())]
    total = (np.linalg.svd(R, full_matrices=False)[1] ** 2).sum()
    U, S, _ = np.linalg.svd(R - M @ M.T @ R, full_matrices=False)
    explained = (total - (S**2).sum()) / total
    r = 0
    for energy in S**2 / total:
        if explained >= eps:
            break
        explained += energy
        r += 1
    return np.hstack([M, U[:, :r]])[:, : M.shape[0]]


class NaiveGPM(Strategy):
    """Dense projectors and SVDs of activations.

    Args:
        threshold: share of energy, one per layer.
        samples: training samples decomposed after a task.
    """

    needs = Needs(rewrites_gradients=True)

    def __init__(self, threshold: Sequence[float], samples: int = 300) -> None:
        self.threshold = list(threshold)
        self.samples = samples
        self.memory: dict[str, np.ndarray] = {}
        self.projectors: list[tuple[torch.nn.Parameter, Tensor]] = []

    def setup(self, learner: Learner, task: Task) -> None:
        """P = M M^T for every layer."""
        self.projectors = [
            (layer.weight, torch.from_numpy((M := self.memory[layer.name]) @ M.T).float())
            for layer in learner.layers(Protect())
            if layer.name in self.memory
        ]

    def constrain(self, learner: Learner) -> None:
        """G <- G - G P."""
        for weight, P in self.projectors:
            assert weight.grad is not None
            size = weight.grad.size(0)
            weight.grad.data = weight.grad.data - torch.mm(weight.grad.data.view(size, -1), P).view(
                weight.size()
            )

    def collect(self, learner: Learner, task: Task) -> Statistics:
        """Keep the inputs of every layer for one batch of samples."""
        return activations(learner, task.sample(self.samples, learner.seed))

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """The published rule: SVD of R, or of R - M M^T R."""
        for (name, inputs), eps in zip(stats.items(), self.threshold, strict=True):
            assert isinstance(inputs, Activations)
            self.memory[name] = published_update(self.memory.get(name), inputs.matrix, eps)

    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """Rank of each basis."""
        return {name: {"rank": M.shape[1]} for name, M in self.memory.items()}
