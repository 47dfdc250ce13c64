"""Bloop (Hsieh et al., 2024: "Careful with that Scalpel", arXiv:2402.02998).

With g the gradient of the main loss, g_a of the auxiliary one and e an average of g over steps,

    d = g + lambda (g_a - (<g_a, e> / |e|^2) e),   e <- (1 - rho) e + rho g

so that in the mean the auxiliary loss changes nothing of the main one's descent. The optimizer
steps along d: plain SGD keeps that, Adam and momentum make another step of it.
"""

from typing import Annotated, Literal

import torch
from torch import Tensor

from cl_bench.contracts import Learner, State, Task
from cl_bench.contracts.options import Inherited, Range, Strength
from cl_bench.strategies.surgery.second import Gradients, SecondObjectives, parts, product

TINY = 1e-30


class Bloop(SecondObjectives):
    """The part of another gradient that the main loss does not care about.

    Args:
        strength: lambda; 0 is plain training.
        rho: of the average; 1 projects on the step's own gradient.
        main: whose loss is not to be disturbed: that of the ``current`` batch, or of the
            ``memory``, for which new samples are the auxiliary loss.
        order: ``paper`` projects on the average of before the step, ``code``, as the authors have
            it, on the one that the step's gradient has joined.
        start: what the average is at a task's first step: that step's ``gradient``, or ``zeros``,
            with which nothing is projected in it.
        rescale: divide d by 1 + lambda.
        scope: one product over all parameters (``global``), or one for each (``layer``).
        shared: as in :class:`SecondObjectives`; of several old tasks, their mean.
    """

    def __init__(
        self,
        strength: Strength = 0.1,
        rho: Annotated[float, Range(above=0, most=1)] = 0.01,
        main: Literal["current", "memory"] = "current",
        order: Literal["paper", "code"] = "paper",
        start: Literal["gradient", "zeros"] = "gradient",
        rescale: bool = False,
        scope: Literal["global", "layer"] = "global",
        **shared: Inherited,
    ) -> None:
        super().__init__(**shared)
        self.strength = strength
        self.rho = rho
        self.main_loss = main
        self.order = order
        self.start = start
        self.rescale = rescale
        self.scope = scope
        self.average: Gradients = {}

    def setup(self, learner: Learner, task: Task) -> None:
        """Another main loss has another average."""
        super().setup(learner, task)
        self.average = {}

    def constrain(self, learner: Learner) -> None:
        """G <- d."""
        if not self.kept or not self.strength:
            return
        ours, found = self.main(learner), self.others(learner)
        theirs = {n: torch.stack([o[n] for o in found]).mean(0) for n in ours}
        g, added = (ours, theirs) if self.main_loss == "current" else (theirs, ours)
        e = self.remembered(g)
        scale = 1 / (1 + self.strength) if self.rescale else 1.0
        for part in parts(g, self.scope):
            mine = {n: e[n] for n in part}
            share = product(mine, added) / product(mine, mine).clamp_min(TINY)
            for n in part:
                direction = g[n] + self.strength * (added[n] - share * mine[n])
                ours[n].copy_(scale * direction)

    def remembered(self, g: Gradients) -> Gradients:
        """The average that this step projects on; afterwards g has joined it."""
        for name, gradient in g.items():
            if name not in self.average:
                blank = self.start == "zeros"
                self.average[name] = torch.zeros_like(gradient) if blank else gradient.clone()
        before = {name: self.average[name] for name in g}
        after: dict[str, Tensor] = {n: e.lerp(g[n], self.rho) for n, e in before.items()}
        self.average.update(after)
        return before if self.order == "paper" else after

    def state_dict(self) -> State:
        """The memory and the average."""
        return {**super().state_dict(), "average": dict(self.average)}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        super().load_state_dict(state)
        self.average = dict(state["average"])
