"""Stages of a task's training: its own, then the phases that the strategy asks for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from cl_bench.contracts import Data, Phase, Plan, State, Task


@dataclass(frozen=True)
class Stage:
    """What one Trainer and one optimizer learn.

    Attributes:
        index: 0 is the task's own training, k its k-th phase.
        data: its samples.
        epochs: how many; None leaves it to ``trainer.max_epochs``.
        phase: None for the task's own training.
        batches: learned in the stages before.
        steps: optimizer steps taken in the stages before.
        resumed: the part of a checkpoint from inside this stage, where the run goes on from one.
    """

    index: int
    data: Data
    epochs: int | None
    phase: Phase | None = None
    batches: int = 0
    steps: int = 0
    resumed: State | None = None

    @classmethod
    def of_task(cls, task: Task, plan: Plan) -> Self:
        """The first one."""
        return cls(0, plan.data, task.epochs if plan.epochs is None else plan.epochs)

    def next(self, phases: Sequence[Phase], batches: int, steps: int) -> "Stage | None":
        """The one after this, where so much was learned in this one; None after the last."""
        if self.index >= len(phases):
            return None
        phase = phases[self.index]
        found = Stage(self.index + 1, phase.data, phase.epochs, phase)
        return replace(found, batches=self.batches + batches, steps=self.steps + steps)

    @classmethod
    def of_checkpoint(cls, phases: Sequence[Phase], inside: State) -> Self:
        """The one that a checkpoint lies in."""
        phase = phases[inside["stage"] - 1]
        found = cls(inside["stage"], phase.data, phase.epochs, phase)
        return replace(found, **inside["earlier"], resumed=inside)
