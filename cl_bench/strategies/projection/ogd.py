"""Orthogonal Gradient Descent (Farajtabar, Azizan, Mott & Li, AISTATS 2020).

For samples x of old tasks, with y their classes, B is an orthonormal basis of the gradients of
f_y(x), the logit of the sample's own class, at the end of its task. Later updates u <- u - B B^T u
leave these logits as they are, to first order.

The rule follows github.com/MehdiAbbanaBennani/continual-learning-ogdplus; we have not checked the
paper's equation numbers.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from cl_bench.contracts import (
    CLASSIFIED,
    Batch,
    Learner,
    Needs,
    Protect,
    State,
    Statistics,
    Strategy,
    Task,
    split_batch,
)
from cl_bench.contracts.options import Count
from cl_bench.subspace import extend_to_span

PIECE = 64
"""Samples whose gradients are in memory at once."""


class OGD(Strategy):
    """Keeps updates orthogonal to the gradients of old samples' logits.

    All parameters that tasks share are one vector; heads that one task each learns are free. Under
    plain SGD the gradient is projected, else the step. The statistics of normalisation layers stay
    as the first task left them, and so do their parameters.

    Args:
        samples: training samples of every task whose gradients are kept, each as long as all shared
            parameters.
    """

    needs = Needs(rewrites_gradients=True, shardable=False, modalities=CLASSIFIED)

    def __init__(self, samples: Count = 200) -> None:
        self.samples = samples
        self.basis: Tensor | None = None  # B (all shared parameters, rank)
        self.active: Tensor | None = None  # of what trains in this task
        self.stepwise = False
        self.before: Tensor | None = None  # weights before the step under way

    def shared(self, learner: Learner) -> dict[str, nn.Parameter]:
        """What tasks share, trained now or not, in the order of the vector."""
        kept: set[object] = set(learner.others((), norms=False))
        for layer in learner.layers(Protect()):
            kept |= {layer.weight, layer.bias}
        return {n: p for n, p in learner.network.named_parameters() if p in kept}

    def guarded(self, learner: Learner) -> frozenset[str]:
        """All that tasks share."""
        return frozenset(self.shared(learner))

    def setup(self, learner: Learner, task: Task) -> None:
        """Hold what no gradient speaks of: running statistics."""
        learner.guard(Protect(), first_task=self.basis is None)
        self.stepwise, self.active = learner.projectable == "step", None

    def constrain(self, learner: Learner) -> None:
        """G <- g - B B^T g, or remember the weights."""
        if self.basis is None:
            return
        shared = self.shared(learner)
        if self.active is None:
            self.active = self.restricted(shared.values())
        if self.stepwise:
            self.before = flat(p.detach() for p in shared.values())
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in shared.values()]
        take(gradients, self.along(flat(gradients)))

    def after_step(self, learner: Learner, batch: Batch, out: Tensor) -> None:
        """Momentum, Adam and weight decay: the same for the step itself."""
        if self.before is None:
            return
        weights = [p.detach() for p in self.shared(learner).values()]
        take(weights, self.along(flat(weights) - self.before))
        self.before = None

    def along(self, vector: Tensor) -> Tensor:
        """B B^T v: the part of a vector that old logits depend on."""
        assert self.active is not None
        self.active = self.active.to(vector)
        return self.active @ (self.active.t() @ vector)

    def restricted(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """The basis of what gradients say of the parameters that train now; others do not move."""
        assert self.basis is not None
        trains = flat(torch.full_like(p, float(p.requires_grad)) for p in parameters)
        if bool(trains.all()):
            return self.basis
        rows = self.basis * trains.to(self.basis)[:, None]
        return extend_to_span(rows[:, :0], rows)

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """The gradients of the task's samples join the basis."""
        shared, rows = self.shared(learner), []
        sample = task.sample(self.samples, learner.seed)
        for piece in split_batch(sample, PIECE, learner.least_batch):
            found = learner.gradients(piece, of="logits", per_sample=True)
            n = len(next(iter(piece.values())))
            blank = {k: p.new_zeros(n, p.numel()) for k, p in shared.items()}
            rows.append(torch.cat([found.get(k, v).reshape(n, -1) for k, v in blank.items()], 1))
        gradients = torch.cat(rows).t()
        known = gradients[:, :0] if self.basis is None else self.basis.to(gradients)
        self.basis = extend_to_span(known, gradients)

    def release(self, learner: Learner) -> None:
        """The task is over."""
        self.active, self.before = None, None

    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """Directions that are kept, and the share of the parameters' space that is left."""
        if self.basis is None:
            return {}
        p, k = self.basis.shape
        return {"all shared parameters": {"rank": k, "capacity_left": 1 - k / p}}

    def state_dict(self) -> State:
        """The basis."""
        return {"basis": self.basis}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.basis, self.active = state["basis"], None


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """All numbers as one vector."""
    return torch.cat([t.reshape(-1) for t in tensors])


def take(tensors: Iterable[Tensor], vector: Tensor) -> None:
    """Subtract from tensors, in place, their parts of a vector like :func:`flat`'s."""
    start = 0
    for tensor in tensors:
        tensor -= vector[start : start + tensor.numel()].view_as(tensor)
        start += tensor.numel()
