"""Synaptic Intelligence (Zenke, Poole & Ganguli, ICML 2017).

Along a task's path every weight's share of the fall of the loss is added up, step by step,

    w_i <- w_i - g_i (theta_i,after - theta_i,before),    g the gradient of the loss alone,

and at its end  Omega_i <- Omega_i + w_i / ((theta_i - theta_i,start)^2 + xi). Old tasks pull by
c sum_i Omega_i (theta_i - theta*_i)^2.

The rule follows github.com/GMvandeVen/continual-learning and github.com/ganguli-lab/pathint; we
have not checked the paper's equation numbers.
"""

from typing import Literal

import torch
from torch import Tensor

from cl_bench.contracts import Batch, Learner, Needs, State, Statistics, Task
from cl_bench.contracts.options import Rate, Strength
from cl_bench.strategies.penalty.quadratic import Quadratic


class SI(Quadratic):
    """Pulls weights back by what they did for the loss of old tasks.

    What a companion adds to the loss or does to gradients before is part of g.

    Args:
        strength: c.
        damping: xi.
        negative: what becomes of an importance below zero, whose weight went uphill: ``keep`` it
            (van de Ven's code), or ``drop`` it (pathint: zero in its place).
    """

    needs = Needs(shardable=False)

    def __init__(
        self,
        strength: Strength = 10.0,
        damping: Rate = 0.1,
        negative: Literal["keep", "drop"] = "keep",
    ) -> None:
        super().__init__(strength)
        self.damping = damping
        self.negative = negative
        self.path: dict[str, Tensor] = {}  # w of this task
        self.start: dict[str, Tensor] = {}  # weights that the task began with
        self.step: dict[str, tuple[Tensor, Tensor]] = {}  # theta and g before the step under way

    def setup(self, learner: Learner, task: Task) -> None:
        """A path begins."""
        self.start = {n: p.detach().clone() for n, p in learner.named_trainable().items()}
        self.path = {}

    def constrain(self, learner: Learner) -> None:
        """Remember theta and g, without the penalty's part 2 c Omega (theta - theta*)."""
        self.step = {}
        for name, p in learner.named_trainable().items():
            if p.grad is None:
                continue
            before, gradient = p.detach().clone(), p.grad.detach().clone()
            if name in self.importance:
                omega, centre = self.importance[name].to(p), self.centre[name].to(p)
                gradient -= 2 * self.strength * omega * (before - centre)
            self.step[name] = before, gradient

    def after_step(self, learner: Learner, batch: Batch, out: Tensor) -> None:
        """Add -g (theta_after - theta_before) to w."""
        weights = learner.named_trainable()
        for name, (before, gradient) in self.step.items():
            fall = gradient.mul_(before.sub_(weights[name].detach()))
            self.path[name] = self.path[name].to(fall).add_(fall) if name in self.path else fall
        self.step = {}

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """Omega <- Omega + w / (D^2 + xi), theta* <- the weights."""
        found = {}
        for name, p in learner.named_trainable().items():
            moved = p.detach() - self.start[name].to(p)
            path = self.path.get(name, torch.zeros_like(p)).to(p)
            found[name] = path / (moved.square() + self.damping)
        self.remember(learner, found)
        if self.negative == "drop":
            self.importance = {n: v.clamp_min(0) for n, v in self.importance.items()}

    def release(self, learner: Learner) -> None:
        """The path is over."""
        self.path, self.start, self.step = {}, {}, {}

    def state_dict(self) -> State:
        """Importance, centre and the path so far."""
        return {**super().state_dict(), "path": dict(self.path)}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        super().load_state_dict(state)
        self.path = {n: w.clone() for n, w in state["path"].items()}
