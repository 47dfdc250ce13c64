"""Averaged Gradient Episodic Memory (Chaudhry et al., ICLR 2019, "Efficient Lifelong Learning").

With g the gradient of a step and r that of samples drawn from a memory of old tasks (Eq. 11),

    g <- g - (g^T r / r^T r) r    where g^T r < 0,

so that to first order the step does not raise the loss on those samples. Plain SGD takes that step;
momentum, weight decay and Adam make another of it.
"""

import torch

from cl_bench.contracts import Learner, Needs, State, Statistics, Strategy, Task, generator
from cl_bench.contracts.options import Count
from cl_bench.strategies.logits import Asked, open_heads
from cl_bench.strategies.replay.buffer import ByTask


class AGEM(Strategy):
    """No step against the gradient of old samples.

    Args:
        memory: samples kept of every task, drawn when it ends.
        reference: samples of the memory that a step's reference gradient is taken of.
        logits: classes that compete: those seen so far, or those of tasks to come as well.
    """

    needs = Needs(rewrites_gradients=True, shardable=False)

    def __init__(self, memory: Count = 256, reference: Count = 256, logits: Asked = "seen") -> None:
        self.reference = reference
        self.logits = logits
        self.kept = ByTask(memory)
        self.rng: torch.Generator | None = None

    @property
    def exemplars(self) -> int:
        """Samples of all tasks."""
        return len(self.kept)

    def setup(self, learner: Learner, task: Task) -> None:
        """Old samples are answered by heads of their own."""
        open_heads(learner, self.logits, old=True)
        self.rng = self.rng or generator(learner.seed, "reference")

    def constrain(self, learner: Learner) -> None:
        """Eq. 11."""
        if not len(self.kept):
            return
        drawn = torch.randperm(len(self.kept), generator=self.rng)[: self.reference]
        r = learner.gradients({k: v[drawn] for k, v in self.kept.batch.items()}, mode="train")
        g = {n: p.grad for n, p in learner.named_trainable().items() if p.grad is not None}
        product = sum((g[n] * r[n]).sum() for n in g)
        if product < 0:
            scale = product / sum(r[n].square().sum() for n in g)
            for name, gradient in g.items():
                gradient.sub_(scale * r[name])

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """A part of the task joins the memory."""
        self.kept.take(task, learner.seed)

    def state_dict(self) -> State:
        """The memory, and the random state of what is drawn from it."""
        rng = None if self.rng is None else self.rng.get_state()
        return {**self.kept.state_dict(), "rng": rng}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.kept.load_state_dict(state)
        self.rng = None
        if state["rng"] is not None:
            self.rng = torch.Generator()
            self.rng.set_state(state["rng"])
