"""EASE (Zhou et al., CVPR 2024; LAMDA-PILOT @ 5240714, models/ease.py).

Every task t learns adapters A_t beside the MLPs of a frozen network, by cross-entropy over its own
classes of scaled cosines, and is closed with them: phi_t(x) (d,) are the features under A_t. With
P[c, j] the mean of class c's features phi_j, an old class o of task i is known in a newer subspace
j > i by what is alike in its own (Eqs. 8 to 10): over K, the classes of tasks j to the latest,

    P[o, j] = sum_{n in K} a_n P[n, j],   a = softmax(cos(P[o, i], P[n, i]) / temperature).

With t + 1 tasks learned, class c of task i has the logit (Eq. 12)

    cos(phi_i(x), P[c, i]) + alpha / t sum_{j != i} cos(phi_j(x), P[c, j]).

The classifier that a task is learned with is its own head, read as a cosine head; it answers
nothing afterwards. Left out is the released code's third term, with the network without adapters,
which is switched off there.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from cl_bench.blocks import Bottleneck, Bottlenecks, blocks_of
from cl_bench.contracts import (
    CLASSIFIED,
    Batch,
    Learner,
    Loss,
    Needs,
    Plan,
    State,
    Statistics,
    Stream,
    Task,
    UsageError,
)
from cl_bench.contracts.options import Count, PartShare, Rate, Strength
from cl_bench.strategies.analytic.closed_form import ClosedForm
from cl_bench.strategies.analytic.cosine_start import Scale, cosine_loss
from cl_bench.strategies.analytic.ncm import cosines
from cl_bench.strategies.blocks.prompting import hold_body


class EASE(ClosedForm):
    """Adapters of every task, class means in all their features, made up where there are none.

    Args:
        r: width of an adapter's bottleneck.
        scale: of an adapter's output.
        dropout: share of a bottleneck that training leaves out.
        alpha: weight of what other tasks' adapters say.
        temperature: of the softmax; 1 is nearly uniform.

    Attributes:
        tasks: of each that is learned, where its classes begin and end.
        begun: how many have begun.
        prototypes: P, (tasks, C, d) float64; zero where a class is not known.
    """

    needs = Needs(
        modalities=CLASSIFIED,
        scenarios=frozenset({"class", "task"}),
        shardable=False,
        freezes_weights=True,
        adapts=True,
    )

    def __init__(
        self,
        r: Count = 64,
        scale: Rate = 0.1,
        dropout: PartShare = 0.1,
        alpha: Strength = 0.1,
        temperature: Rate = 1.0,
    ) -> None:
        super().__init__(epochs=None)
        self.r, self.scale, self.dropout = r, scale, dropout
        self.alpha, self.temperature = alpha, temperature
        self.tasks: list[tuple[int, int]] = []
        self.begun = 0
        self.prototypes = torch.zeros(0, 0, 0, dtype=torch.float64)
        self._start = self._measured = 0
        self._shown: int | None = None
        self._attached: Bottlenecks | None = None

    @property
    def passes(self) -> int:
        """One for every task's adapters."""
        return max(1, len(self.tasks))

    @property
    def adapters(self) -> int:
        """Those of all tasks."""
        return len(self.tasks)

    def plan(self, stream: Stream, t: int) -> Plan:
        """Every task trains."""
        return Plan(stream[t].train)

    def check(self, learner: Learner) -> None:
        """The network must have blocks, and a task at least two classes.

        Raises:
            UsageError: it has not.
        """
        super().check(learner)
        blocks_of(learner, "EASE")
        heads = [name for name, role in learner.roles().items() if role == "head"]
        if any(len(learner.weights()[name]) == 1 for name in heads):
            raise UsageError(
                "EASE learns to tell a task's classes apart, and a task of this stream has one "
                "class: give tasks at least two (stream.classes_per_task=2)"
            )

    def modules(self, learner: Learner) -> Mapping[str, nn.Module]:
        """Adapters of every task that has begun; while one is learned, a factor of cosines."""
        widths = [block.width for block in blocks_of(learner, "EASE")] if self.begun else []
        found: dict[str, nn.Module] = {}
        for t in range(self.begun):
            made = [Bottleneck(width, self.r, self.scale, self.dropout) for width in widths]
            found[f"task{t}"] = nn.ModuleList(made)
        if self.begun > len(self.tasks):
            found["scale"] = Scale()
        return found

    def setup(self, learner: Learner, task: Task) -> None:
        """Freeze the network and all adapters but the task's own, which are put there."""
        hold_body(learner)
        learner.train_heads("current")
        learner.hold(list(learner.extras(self).values()))
        self.begun = len(self.tasks) + 1
        self._start = task.classes.start
        self._attached, self._shown = self._beside(learner), len(self.tasks)

    def _beside(self, learner: Learner) -> Bottlenecks:
        def shown() -> Sequence[nn.Module] | None:
            if self._shown is None:
                return None
            return list(cast(nn.ModuleList, learner.extras(self)[f"task{self._shown}"]))

        return Bottlenecks(blocks_of(learner, "EASE"), shown)

    def objective(self, learner: Learner, batch: Batch, out: Tensor) -> Loss:
        """Cross-entropy of scaled cosines over the task's own classes."""
        return cosine_loss(learner, batch, cast(Scale, learner.extras(self)["scale"]), self._start)

    def read(self, learner: Learner, batch: Batch) -> Tensor:
        """Features (n, tasks d) under the adapters of all tasks, side by side."""
        before, attached = self._shown, self._attached or self._beside(learner)
        found = []
        try:
            for j in range(self._measured):
                self._shown = j
                found.append(learner.features(batch))
        finally:
            self._shown = before
            if attached is not self._attached:
                attached.remove()
        return torch.cat(found, dim=1)

    def collect(self, learner: Learner, task: Task) -> Statistics:
        """Counts and sums of the task's classes, under the new adapters too."""
        self._measured = self.begun
        try:
            return super().collect(learner, task)
        finally:
            self._measured = len(self.tasks)

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """True means of the task's classes, and made up ones of all older classes."""
        counts, sums = (torch.as_tensor(stats[name]).cpu()[0] for name in ("counts", "sums"))
        C, J = max(self.counts.shape[1], task.classes.stop), self.begun
        means = (sums / counts.clamp(min=1)[:, None]).view(len(sums), J, -1).transpose(0, 1)
        own = slice(task.classes.start, task.classes.stop)
        known = means.new_zeros(J, C, means.shape[2])
        if self.tasks:
            known[: J - 1, : self.counts.shape[1]] = self.prototypes
        known[:, own] = means
        joined = counts.new_zeros(1, C)
        joined[:, : self.counts.shape[1]] = self.counts
        joined[0, own] += counts
        self.prototypes, self.counts = known, joined
        self.tasks.append((task.classes.start, task.classes.stop))
        self._measured = len(self.tasks)
        self._make_up()

    def _make_up(self) -> None:
        """P[o, j] of all classes of tasks before j, from the tasks from j on."""
        P, tasks = self.prototypes, self.tasks
        for j in range(1, len(tasks)):
            newer = [c for start, stop in tasks[j:] for c in range(start, stop)]
            newer = [c for c in newer if self.counts[0, c]]
            for i in range(j):
                old = [c for c in range(*tasks[i]) if self.counts[0, c]]
                a = (cosines(P[i, old], P[i, newer]) / self.temperature).softmax(1)
                P[j, old] = a @ P[j, newer]

    def scores(self, h: Tensor, classes: list[int]) -> Tensor:
        """A class's own subspace, and alpha times the mean of the others."""
        J = len(self.tasks)
        parts = h.view(len(h), J, -1).unbind(1)
        pairs = zip(parts, self.prototypes, strict=True)
        said = torch.stack([cosines(part.contiguous(), P[classes]) for part, P in pairs])
        owner = {c: i for i, (start, stop) in enumerate(self.tasks) for c in range(start, stop)}
        own = torch.tensor([owner[c] for c in classes], device=h.device)
        logits = said.gather(0, own.expand(1, len(h), -1))[0]
        if J == 1 or self.alpha == 0:
            return logits
        return logits + self.alpha / (J - 1) * (said.sum(0) - logits)

    def release(self, learner: Learner) -> None:
        """The blocks are alone again."""
        if self._attached is not None:
            self._attached.remove()
        self._attached = self._shown = None

    def state_dict(self) -> State:
        """Tasks, and class means; the adapters are the learner's."""
        return {
            "tasks": [list(task) for task in self.tasks],
            "begun": self.begun,
            "counts": self.counts,
            "prototypes": self.prototypes,
        }

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.tasks = [(start, stop) for start, stop in state["tasks"]]
        self.begun, self.counts = state["begun"], state["counts"]
        self.prototypes, self._measured = state["prototypes"], len(self.tasks)
