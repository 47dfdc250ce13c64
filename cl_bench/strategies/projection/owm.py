"""Orthogonal Weights Modification (Zeng, Chen, Cui & Yu, Nature Machine Intelligence 2019).

The gradient G (o x d) of a layer becomes G P, with P = alpha (alpha I + A)^-1 = (A / alpha + I)^-1
and A what the layer's inputs x were in old tasks: weights move in directions that old inputs
hardly have.

Here A is the mean of x x^T over the samples of a task, and the mean over tasks; it is taken when a
task ends (as in github.com/GMvandeVen/continual-learning), not while it is learned. The authors'
code takes the sum over all batches of r r^T, r the batch's mean input, which its recursive least
squares turn into the same formula, within the first task too: their alpha is ours times the number
of batches.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from cl_bench.contracts import Batch, Learner, Needs, State, Statistics, Task
from cl_bench.contracts.options import Count, Inherited, Rate
from cl_bench.strategies.projection.options import Protecting, training_batches
from cl_bench.subspace import Confinement, Moments, Where, inverse_projection


class OWM(Protecting):
    """Scales every direction of a layer's updates by alpha / (alpha + its energy in old inputs).

    Args:
        alpha: energy, as part of the mean of x x^T, of a direction that is half taken out.
        samples: training samples of a task that A is measured on; None means all.
        shared: as in :class:`Protecting`.

    Raises:
        UsageError: an option is out of range.
    """

    needs = Needs(rewrites_gradients=True)

    def __init__(
        self, alpha: Rate = 1e-2, samples: Count | None = None, **shared: Inherited
    ) -> None:
        super().__init__(**shared)
        self.alpha = alpha
        self.samples = samples
        self.seen: dict[str, Tensor] = {}  # A of every layer
        self.tasks: dict[str, int] = {}  # that A is the mean over
        self.confinement: Confinement | None = None

    def check(self, learner: Learner) -> None:
        """There must be layers to protect."""
        learner.layers(self.protect)

    def setup(self, learner: Learner, task: Task) -> None:
        """From the second task on, every protected layer learns through its P."""
        learner.guard(self.protect, first_task=not self.seen)
        projections = {name: inverse_projection(A, self.alpha) for name, A in self.seen.items()}
        where: Where = "step" if learner.projectable == "step" else "gradient"
        self.confinement = Confinement(learner.layers(self.protect), projections, where, {})

    def constrain(self, learner: Learner) -> None:
        """G <- G P."""
        if self.confinement:
            self.confinement.constrain()

    def after_step(self, learner: Learner, batch: Batch, out: Tensor) -> None:
        """Momentum, Adam and weight decay: P on the step itself."""
        if self.confinement:
            self.confinement.after_step()

    def collect(self, learner: Learner, task: Task) -> Statistics:
        """Sum x x^T of every layer's inputs."""
        batches = training_batches(learner, task, self.samples)
        return learner.tap(learner.layers(self.protect), batches)

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """A <- the mean over tasks of the mean of x x^T."""
        for name, moments in stats.items():
            assert isinstance(moments, Moments)
            if not moments.rows:  # a head that takes no part
                continue
            new, n = moments.gram / moments.rows, self.tasks.get(name, 0)
            old = self.seen.get(name, torch.zeros_like(new)).to(new)
            self.seen[name], self.tasks[name] = (n * old + new) / (n + 1), n + 1

    def release(self, learner: Learner) -> None:
        """Give the layers their own steps back."""
        if self.confinement:
            self.confinement.release()
        self.confinement = None

    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """How many dimensions are taken out, tr(I - P), and the share that is left, tr(P) / d."""
        found = {}
        for name, A in self.seen.items():
            energies = torch.linalg.eigvalsh(A).clamp_min(0)
            taken = float((energies / (energies + self.alpha)).sum())
            found[name] = {"rank": taken, "capacity_left": 1 - taken / len(A)}
        return found

    def state_dict(self) -> State:
        """A, and the tasks in it."""
        return {"seen": dict(self.seen), "tasks": dict(self.tasks)}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.seen, self.tasks = dict(state["seen"]), dict(state["tasks"])
