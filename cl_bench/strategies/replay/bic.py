"""BiC: bias correction (Wu et al., CVPR 2019, "Large Scale Incremental Learning").

Stage 1 learns a task with exemplars and (1 - l) CE + l KD, l = old classes / all classes. Stage 2
fits two numbers on samples kept apart from stage 1, as many of every class:

    q_k = alpha o_k + beta   for the task's classes, q_k = o_k for others   (Eq. 4)

Tasks keep their pairs: what is distilled, trained and answered later is corrected by those of old
tasks. Stage 2 sees the network in evaluation mode.
"""

import torch
from torch import Tensor, nn

from cl_bench.contracts import (
    Batch,
    Learner,
    Loss,
    Phase,
    Plan,
    Protect,
    State,
    Statistics,
    Stream,
    Task,
)
from cl_bench.contracts.options import Count, PartShare, Rate
from cl_bench.strategies.logits import cross_entropy
from cl_bench.strategies.replay.classwise import Classwise, Select

NO_NORMS = Protect(bias="free", embeddings="free", tied="free")
"""Holds normalisation layers, and nothing else."""


class Line(nn.Module):
    """alpha o + beta, at first o."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1))
        self.beta = nn.Parameter(torch.zeros(1))

    def forward(self, o: Tensor) -> Tensor:
        """Of logits of any shape."""
        return o * self.alpha.to(o) + self.beta.to(o)


class BiC(Classwise):
    """Replay and distillation, then a line through the new classes' logits.

    Args:
        memory: samples kept, over all classes.
        select: which of a class.
        temperature: of the distillation.
        squared: whether it is multiplied by temperature^2.
        apart: share of an old class's samples, and as many of each new one, for stage 2.
        epochs: of stage 2.
        rate: of stage 2; None takes the run's.
    """

    least = 2

    def __init__(
        self,
        memory: Count = 2000,
        select: Select = "herding",
        temperature: Rate = 2.0,
        squared: bool = True,
        apart: PartShare = 0.1,
        epochs: Count = 50,
        rate: Rate | None = None,
    ) -> None:
        super().__init__(memory, select)
        self.temperature = temperature
        self.squared = squared
        self.apart = apart
        self.epochs = epochs
        self.rate = rate
        self.tasks: list[int] = []  # for each that is learned, the end of its classes

    def plan(self, stream: Stream, t: int) -> Plan:
        """All that is not kept apart; :class:`UsageError` if the memory is too small."""
        self.require_room(stream)
        return Plan(self.parted(stream[t], self.apart)[0])

    def modules(self, learner: Learner) -> dict[str, nn.Module]:
        """A line for every task but the first, that which comes next included."""
        return {f"task{t + 1}": Line() for t in range(len(self.tasks))}

    def setup(self, learner: Learner, task: Task) -> None:
        """Lines learn in stage 2 alone."""
        super().setup(learner, task)
        learner.hold(learner.extras(self).values())

    def corrected(self, learner: Learner, out: Tensor) -> Tensor:
        """Logits (n, C) with the line of each task; classes to come stay as they are."""
        lines, start, parts = learner.extras(self), 0, []
        for t, stop in enumerate(sorted({*self.tasks, self.seen} - {0})):
            logits = out[:, start:stop]
            parts.append(lines[f"task{t}"](logits) if t else logits)
            start = stop
        return torch.cat([*parts, out[:, start:]], dim=1)

    def objective(self, learner: Learner, batch: Batch, out: Tensor) -> Loss:
        """(1 - l) CE + l KD, old classes corrected in both networks."""
        said = None
        if self.teacher is not None:
            said = self.corrected(learner, self.teacher(batch))[:, : self.old]
        return self.weighed(learner, batch, self.corrected(learner, out), said)

    def phases(self, learner: Learner, task: Task) -> list[Phase]:
        """Stage 2."""
        data = self.parted(task, self.apart)[1]
        if data is None:
            return []

        def groups(learner: Learner) -> list[dict[str, object]]:
            learner.guard(NO_NORMS, first_task=False)
            line = learner.extras(self)[f"task{len(self.tasks)}"]
            rate = {} if self.rate is None else {"lr": self.rate}
            return [{"params": list(line.parameters()), **rate}]

        return [Phase("bias", data, self.epochs, groups, self.of_the_line)]

    def of_the_line(self, learner: Learner, batch: Batch, out: Tensor) -> Loss:
        """Cross-entropy of corrected logits."""
        with torch.no_grad(), learner.evaluating():
            out = learner(batch)
        return cross_entropy(learner, self.corrected(learner, out), batch, None)

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """Choose exemplars, of all the task's samples."""
        super().consolidate(learner, task, stats)
        self.tasks.append(task.classes.stop)

    def predict(self, learner: Learner, batch: Batch, task: Task | None) -> Tensor:
        """Corrected logits."""
        return self.corrected(learner, learner(batch)) if self.tasks else learner(batch)

    def state_dict(self) -> State:
        """What is kept, and where tasks' classes end."""
        return {**super().state_dict(), "tasks": list(self.tasks)}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        super().load_state_dict(state)
        self.tasks = list(state["tasks"])
