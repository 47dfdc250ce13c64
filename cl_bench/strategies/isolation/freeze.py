"""Freezing the bottom of the network (Zheng et al., ICLR 2025, "Spurious Forgetting").

From the second task on, input embeddings and the first n blocks keep their weights bit for bit;
what lies above them re-aligns. No old data, no memory; backward passes end at block n.
"""

from dataclasses import replace
from typing import Annotated, Literal

from torch import nn

from cl_bench.contracts import (
    EpochDecision,
    Learner,
    Memory,
    Needs,
    Progress,
    Strategy,
    Task,
    UsageError,
)
from cl_bench.contracts.options import Count, Index, OnlyWith, SomeShare


class Freeze(Strategy):
    """Keeps input embeddings and the ``n_blocks`` blocks next to them as they were.

    Args:
        n_blocks: how many blocks, counted from the input by index, never by name.
        start_task: index of the first task that they are frozen for.
        embeddings: freeze input embeddings too, where the network has them.
        tied: what becomes of an embedding that an output layer shares: ``refuse`` to start,
            ``train`` it on, or ``freeze`` it and the output layer with it.
        early_stop: from ``start_task`` on, end a task after the first epoch that brings its metric
            on training samples to this value; None never does. What a task learns after it fits
            costs old tasks more than it gives.
        stop_samples: training samples that the metric is taken on.

    Raises:
        UsageError: an option is out of range, or the network has fewer blocks.
    """

    needs = Needs(options={"first_task": "start_task"})

    def __init__(
        self,
        n_blocks: Index = 1,
        start_task: Index = 1,
        embeddings: bool = True,
        tied: Literal["refuse", "train", "freeze"] = "refuse",
        early_stop: SomeShare | None = None,
        stop_samples: Annotated[Count, OnlyWith("early_stop")] = 500,
    ) -> None:
        self.needs = replace(self.needs, first_task=start_task)
        self.idle = frozenset() if early_stop is not None else frozenset({"after_epoch"})
        self.n_blocks = n_blocks
        self.start_task = start_task
        self.embeddings = embeddings
        self.tied = tied
        self.early_stop = early_stop
        self.stop_samples = stop_samples

    def check(self, learner: Learner) -> None:
        """There must be as many blocks, and an embedding that is the output layer must be named."""
        blocks = len(learner.blocks())
        if self.n_blocks > blocks:
            raise UsageError(f"strategy.n_blocks={self.n_blocks}: the network has {blocks} blocks")
        if self.embeddings and self.tied == "refuse" and learner.tied:
            raise UsageError(
                "the output layer shares the input embedding's weight, so freezing one freezes "
                "both: say strategy.tied=freeze to do so, strategy.tied=train to freeze blocks "
                "alone, or untie them (model.tied=false)"
            )

    def frozen(self, learner: Learner) -> list[nn.Module]:
        """What does not learn, once it is frozen."""
        blocks = learner.blocks()[: self.n_blocks]
        if self.embeddings and (self.tied != "train" or not learner.tied):
            return [*learner.embeddings(), *blocks]
        return blocks

    def footprint(self, learner: Learner, tasks: int, processes: int) -> Memory:
        """What is frozen takes less, unless the first task, which trains all, takes the most."""
        if self.start_task:
            return Memory()
        held = {id(p) for module in self.frozen(learner) for p in module.parameters()}
        named = learner.network.named_parameters()
        return Memory(frozen=frozenset(name for name, p in named if id(p) in held))

    def setup(self, learner: Learner, task: Task) -> None:
        """Freeze before the optimizer is built, so that it holds no state for them."""
        self.check(learner)
        if task.index >= self.start_task:
            learner.hold(self.frozen(learner))

    def after_epoch(self, learner: Learner, task: Task, progress: Progress) -> EpochDecision | None:
        """Stop once the new task is learned."""
        if self.early_stop is None or task.index < self.start_task:
            return None
        reached = learner.performance(task.sample(self.stop_samples, learner.seed))
        return EpochDecision(stop=reached >= self.early_stop)
