"""Adam-NSCL (Wang, Li, Sun & Xu, CVPR 2021): training in the null space of feature covariance.

A layer keeps the uncentered covariance C of all inputs it has seen. Its approximate null space U2
is spanned by the eigenvectors whose eigenvalue is at most a times the smallest one. From the second
task on, the optimizer's *step* is projected, W <- W + s U2 U2^T, whatever the optimizer is.

The steps follow the paper's text and the authors' code (github.com/ShipengWang/Adam-NSCL); we have
not checked the equation numbers. The paper also holds normalisation parameters by EWC: either
freeze them after the first task (``protect.norm``, the default), or let them go and add
``+also=ewc``, which then pulls at every parameter.
"""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import torch
from torch import Tensor

from cl_bench.contracts import (
    Batch,
    Learner,
    Needs,
    State,
    Statistics,
    Task,
)
from cl_bench.contracts.options import Count, Inherited, Range, Rate
from cl_bench.strategies.projection.options import Protecting, training_batches
from cl_bench.subspace import Confinement, Moments, Projection

RESOLUTION = float(torch.finfo(torch.float32).eps)
"""Share of tr C below which an eigenvalue holds only the rounding of float32 inputs."""


class AdamNSCL(Protecting):
    """Projects every step into the approximate null space of old inputs.

    Args:
        a: eigenvalues up to ``a`` times the smallest count as zero (the papers' 10 and 30).
        samples: training samples that C is measured on; None means all of the task's.
        official_scale: divide the projector by its Frobenius norm, as the authors' code does: the
            step shrinks by sqrt(dim U2), so the rate must be tuned for it.
        later_rate: learning rate of the protected layers from the second task on; None keeps
            ``optimizer.lr`` (the paper halves it, 1e-4 to 5e-5).
        norm_rate: learning rate of what else the body has, normalisation (the paper: 5e-4).
        head_rate: learning rate of unprotected heads (the paper: 1e-3); they get no weight decay.
        shared: as in :class:`Protecting`.

    Raises:
        UsageError: an option is out of range.
    """

    needs = Needs(rewrites_gradients=True)

    def __init__(
        self,
        a: Annotated[float, Range(least=1)] = 10.0,
        samples: Count | None = None,
        official_scale: bool = False,
        later_rate: Rate | None = None,
        norm_rate: Rate | None = None,
        head_rate: Rate | None = None,
        **shared: Inherited,
    ) -> None:
        super().__init__(**shared)
        self.a = a
        self.samples = samples
        self.official_scale = official_scale
        self.later_rate, self.norm_rate, self.head_rate = later_rate, norm_rate, head_rate
        self.covariance: dict[str, Tensor] = {}
        self.seen: dict[str, int] = {}  # n, the input vectors that C is the mean over
        self.occupied: dict[str, Tensor] = {}  # orthonormal complement of U2
        self.confinement: Confinement | None = None

    def check(self, learner: Learner) -> None:
        """There must be layers to protect."""
        learner.layers(self.protect)

    def setup(self, learner: Learner, task: Task) -> None:
        """From the second task on, confine the step of every protected layer to its U2."""
        learner.guard(self.protect, first_task=not self.occupied)
        projections = {name: self.projection(M) for name, M in self.occupied.items()}
        self.confinement = Confinement(learner.layers(self.protect), projections, "step", {})

    def projection(self, occupied: Tensor) -> Projection:
        """P = U2 U2^T, or P / ||P||_F with ||P||_F = sqrt(dim U2)."""
        d, k = occupied.shape
        return Projection(occupied, scale=max(d - k, 1) ** -0.5 if self.official_scale else 1.0)

    def param_groups(self, learner: Learner) -> Iterable[dict[str, Any]]:
        """Protected layers; the rest of the body; heads. Each with its rate."""
        layers = learner.layers(self.protect)
        protected = {id(p) for layer in layers for p in (layer.weight, layer.bias)}
        body = {id(p) for block in learner.blocks() for p in block.parameters()} - protected
        trained = learner.trainable_parameters()
        later = self.later_rate if self.occupied else None
        return [
            _group([p for p in trained if id(p) in protected], later),
            _group([p for p in trained if id(p) in body], self.norm_rate),
            _group([p for p in trained if id(p) not in protected | body], self.head_rate)
            | {"weight_decay": 0.0},
        ]

    def constrain(self, learner: Learner) -> None:
        """The optimizer sees raw gradients; remember where the weights were."""
        if self.confinement:
            self.confinement.constrain()

    def after_step(self, learner: Learner, batch: Batch, out: Tensor) -> None:
        """W <- W_old + (W_new - W_old) P."""
        if self.confinement:
            self.confinement.after_step()

    def collect(self, learner: Learner, task: Task) -> Statistics:
        """Sum x x^T of every layer's inputs over the task's training data."""
        batches = training_batches(learner, task, self.samples)
        return learner.tap(learner.layers(self.protect), batches)

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """C <- (n C + n_t C_t) / (n + n_t); U2: eigenvalues <= a lambda_min."""
        for name, moments in stats.items():
            assert isinstance(moments, Moments)
            n, n_t = self.seen.get(name, 0), moments.rows
            total = moments.gram + n * self.covariance.get(name, torch.zeros(())).to(moments.gram)
            self.seen[name], self.covariance[name] = n + n_t, total / max(n + n_t, 1)
            eigenvalues, V = torch.linalg.eigh(self.covariance[name])
            # A smallest eigenvalue that is rounding, or negative, says nothing about the others.
            least = eigenvalues[0].clamp_min(RESOLUTION * eigenvalues.sum())
            self.occupied[name] = V[:, eigenvalues > self.a * least].contiguous()

    def release(self, learner: Learner) -> None:
        """Give the layers their own steps back."""
        if self.confinement:
            self.confinement.release()
        self.confinement = None

    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """Dimensions that old inputs occupy, and the share that the null space has."""
        return {
            name: {"rank": M.shape[1], "capacity_left": 1 - M.shape[1] / M.shape[0]}
            for name, M in self.occupied.items()
        }

    def state_dict(self) -> State:
        """C, the number of inputs under it, and the complement of U2."""
        return {
            "covariance": dict(self.covariance),
            "seen": dict(self.seen),
            "occupied": dict(self.occupied),
        }

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.covariance, self.seen = dict(state["covariance"]), dict(state["seen"])
        self.occupied = dict(state["occupied"])


def _group(parameters: list[Any], rate: float | None) -> dict[str, Any]:
    return {"params": parameters} | ({} if rate is None else {"lr": rate})
