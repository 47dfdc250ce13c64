"""ROGO the way the published scripts compute it, to be timed against ours.

Same update rule as :class:`cl_bench.strategies.ROGO`, same relaxations and schedule; only the
arithmetic differs: dense d x d projectors multiply every gradient; a relaxed layer builds its
weight W (B S B^T) + W - W (B B^T) anew in every pass, B S B^T and B B^T as d x d matrices, S the
upper left q x q block of a d x d ``scale``; the penalty runs over the whole of that; bases come
from numpy SVDs of activations. Read off github.com/THUNLP-MT/ROGO @ 87ec345 (layers.py,
main_pmnist.py), which also evaluates the training set after every epoch; we do not.
Linear layers without biases, one shared head.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from naive_gpm import Activations, activations, published_update
from torch import Tensor, nn

from cl_bench.contracts import Batch, Learner, Statistics, Task
from cl_bench.strategies.projection.rogo import ROGO
from cl_bench.subspace import LinearMap


class RescaledLinear(nn.Linear):
    """x (W (B S B^T) + W - W (B B^T))^T."""

    space: Tensor
    scale: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """With the weight built anew."""
        q, B = self.space.shape[1], self.space
        inside = torch.mm(self.weight, torch.mm(torch.mm(B, self.scale[:q, :q]), B.t()))
        outside = torch.mm(self.weight, torch.mm(B, B.t()))
        return F.linear(x, inside + self.weight - outside)


class DenseRescaling:
    """What ROGO asks of :class:`cl_bench.subspace.RelaxedSpaces`, dense; layers hold W."""

    def __init__(self, layers: Sequence[LinearMap]) -> None:
        self.layers = {layer.name: layer for layer in layers}
        self.scales = {
            name: nn.Parameter(torch.eye(layer.in_features)) for name, layer in self.layers.items()
        }
        self.identities = {name: scale.detach().clone() for name, scale in self.scales.items()}
        self.spaces: dict[str, Any] = {}

    def grow(self, name: str, basis: Tensor) -> None:
        """Append columns to the relaxing space."""
        module: Any = self.layers[name].module
        old = [module.space] if name in self.spaces else []
        module.__class__ = RescaledLinear
        module.__dict__["space"] = torch.cat([*old, basis.to(module.weight)], dim=1)
        module.__dict__["scale"] = self.scales[name]
        self.spaces[name] = module

    def parameters(self) -> list[nn.Parameter]:
        """The scales that are in use."""
        return [self.scales[name] for name in self.spaces]

    def distance(self) -> Tensor | None:
        """||scale - I||_F^2 over whole matrices."""
        parts = [((self.scales[n] - self.identities[n]) ** 2).sum() for n in self.spaces]
        return torch.stack(parts).sum() if parts else None

    @torch.no_grad()
    def merge(self) -> None:
        """W <- the weight in use."""
        for module in self.spaces.values():
            q, B = module.space.shape[1], module.space
            W = module.weight
            W.copy_(W - W @ B @ B.t() + W @ B @ module.scale[:q, :q] @ B.t())
        self.clear()

    def clear(self) -> None:
        """Plain layers again."""
        for module in self.spaces.values():
            module.__class__ = nn.Linear
        self.spaces = {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a benchmark is not resumed."""
        return {}


class NaiveROGO(ROGO):
    """Dense projectors, dense scales and SVDs of activations; the options are ROGO's."""

    def setup(self, learner: Learner, task: Task) -> None:
        """P = M M^T for every layer."""
        super().setup(learner, task)
        self.relaxed = DenseRescaling(self.layers)  # type: ignore[assignment]
        self.projectors = [
            (layer.weight, (M := self.memory[layer.name].float()) @ M.t())
            for layer in self.layers
            if layer.name in self.memory
        ]

    def confine(self) -> None:
        """Nothing: :meth:`constrain` does it all."""

    def penalty(self, learner: Learner, batch: Batch, out: Tensor) -> Tensor | None:
        """Beta sum ||scale - I||_F^2."""
        distance = self.relaxed.distance() if self.relaxed else None  # type: ignore[attr-defined]
        return None if distance is None else self.strength * distance

    def constrain(self, learner: Learner) -> None:
        """G <- G - G P."""
        for weight, P in self.projectors:
            assert weight.grad is not None
            size = weight.grad.size(0)
            weight.grad.data = weight.grad.data - torch.mm(weight.grad.data.view(size, -1), P).view(
                weight.size()
            )

    def after_step(self, learner: Learner, batch: Batch, out: Tensor) -> None:
        """Nothing."""

    def collect(self, learner: Learner, task: Task) -> Statistics:
        """Merge, then keep the inputs of every layer for one batch of samples."""
        spaces: Any = self.relaxed
        self.turned = {name: (m.space.shape[1], 0.0) for name, m in spaces.spaces.items()}
        spaces.merge()
        return activations(learner, task.sample(self.samples, learner.seed))

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """The published rule."""
        thresholds: Any = self.threshold
        for (name, inputs), eps in zip(stats.items(), thresholds, strict=True):
            assert isinstance(inputs, Activations)
            old = self.memory.get(name)
            M = published_update(None if old is None else old.numpy(), inputs.matrix, eps)
            self.memory[name] = torch.from_numpy(M)
            self.rows_per_sample[name] = 1.0
