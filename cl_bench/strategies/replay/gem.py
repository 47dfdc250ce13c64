"""Gradient Episodic Memory (Lopez-Paz & Ranzato, NeurIPS 2017).

With g the gradient of a step and the rows of G those of each old task's memory, if G g has a
negative entry (Eq. 11, in its dual form):

    g <- g + G^T v,   v = argmin_{v >= margin} |g + G^T v|^2 / 2

With margin 0 that is the nearest gradient z with G z >= 0; a greater one leans towards old tasks.
Plain SGD takes that step; momentum, weight decay and Adam make another of it.
"""

import torch
from scipy.optimize import nnls
from torch import Tensor

from cl_bench.contracts import Learner, Needs, State, Statistics, Strategy, Task
from cl_bench.contracts.options import Count, Strength
from cl_bench.strategies.logits import Asked, open_heads
from cl_bench.strategies.replay.buffer import ByTask


class GEM(Strategy):
    """No step against the gradient of any old task.

    Args:
        memory: samples kept of every task, drawn when it ends (the authors keep its last ones).
        margin: the least share of every old task's gradient that is added, once one is violated.
        logits: classes that compete: those seen so far, or those of tasks to come as well.
    """

    needs = Needs(rewrites_gradients=True, shardable=False)

    def __init__(self, memory: Count = 256, margin: Strength = 0.5, logits: Asked = "seen") -> None:
        self.margin = margin
        self.logits = logits
        self.kept = ByTask(memory)

    @property
    def exemplars(self) -> int:
        """Samples of all tasks."""
        return len(self.kept)

    def setup(self, learner: Learner, task: Task) -> None:
        """Old samples are answered by heads of their own."""
        open_heads(learner, self.logits, old=True)

    def constrain(self, learner: Learner) -> None:
        """Eq. 11, over parameters that have a gradient."""
        if not len(self.kept):
            return
        g = {n: p.grad for n, p in learner.named_trainable().items() if p.grad is not None}
        flat = torch.cat([gradient.flatten() for gradient in g.values()]).double()
        rows = []
        for batch in self.kept.tasks():
            old = learner.gradients(batch, mode="train")
            rows.append(torch.cat([old[n].flatten() for n in g]).double())
        G = torch.stack(rows)
        if not bool((G @ flat < 0).any()):
            return
        added = nearest(flat, G, self.margin) - flat
        sizes = [gradient.numel() for gradient in g.values()]
        for gradient, part in zip(g.values(), torch.split(added, sizes), strict=True):
            gradient.add_(part.view_as(gradient).to(gradient))

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """A part of the task joins the memory."""
        self.kept.take(task, learner.seed)

    def state_dict(self) -> State:
        """The memory."""
        return self.kept.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.kept.load_state_dict(state)


def nearest(g: Tensor, G: Tensor, margin: float) -> Tensor:
    """G + G^T v for g (p,) and G (k, p), with the v >= margin that makes it shortest."""
    # v = u + margin, u >= 0: least squares of G^T u + (g + margin sum G), in the k dimensions of
    # G's rows, where no product of gradients is squared.
    leaning = g + margin * G.sum(0)
    Q, R = torch.linalg.qr(G.t())
    u, _ = nnls(R.cpu().numpy(), -(Q.t() @ leaning).cpu().numpy())
    return leaning + G.t() @ torch.as_tensor(u).to(G)
