"""Taking part of an update back (task vectors: Ilharco et al., ICLR 2023, section 4).

A task vector is what training has added to the weights; subtracting it undoes part of the task.
Zheng et al. (ICLR 2025) use it as a baseline against forgetting: after a later task::

    theta <- theta - alpha (theta_v - theta_start)

with theta_v the weights after epoch v of the task. That buys old accuracy with new accuracy, so a
number means nothing without the other one; alpha = 1 with v the last epoch gives the weights of
before the task by construction.
"""

from dataclasses import replace

import torch
from torch import Tensor

from cl_bench.contracts import (
    EpochDecision,
    Learner,
    Needs,
    Progress,
    State,
    Statistics,
    Strategy,
    Task,
    UsageError,
)
from cl_bench.contracts.options import Count, Index, Strength


class TaskVector(Strategy):
    """Subtracts a share of every later task's vector once the task is learned.

    Args:
        alpha: the share; 0 is fine-tuning.
        epoch: v, from 1; None is the task's last one.
        start_task: index of the first task whose vector is subtracted.

    Raises:
        UsageError: an option is out of range.
    """

    needs = Needs(own_weights=True, options={"first_task": "start_task", "epochs": "epoch"})

    def __init__(
        self, alpha: Strength = 0.4, epoch: Count | None = None, start_task: Index = 1
    ) -> None:
        self.needs = replace(self.needs, first_task=start_task, epochs=epoch or 1)
        self.alpha = alpha
        self.epoch = epoch
        self.start_task = start_task
        self.start: dict[str, Tensor] = {}
        self.marked: dict[str, Tensor] = {}

    def setup(self, learner: Learner, task: Task) -> None:
        """theta_start."""
        self.start, self.marked = _weights(learner), {}

    def after_epoch(self, learner: Learner, task: Task, progress: Progress) -> EpochDecision | None:
        """theta_v."""
        if self.epoch is not None and self.epoch > progress.max_epochs:
            raise UsageError(
                f"strategy.epoch={self.epoch}: task {task.name!r} has {progress.max_epochs} "
                "epochs; name one of them, or null for the last"
            )
        if progress.epoch == self.epoch:
            self.marked = _weights(learner)
        return None

    @torch.no_grad()
    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """Theta <- theta - alpha (theta_v - theta_start); theta_v of a shorter task is its end."""
        if task.index < self.start_task:
            return
        marked = self.marked or _weights(learner)
        for name, weight in learner.named_trainable().items():
            start = self.start[name].to(weight.device)
            if self.alpha == 1.0 and not self.marked:
                weight.copy_(start)  # to the bit
            else:
                weight.sub_(marked[name].to(weight.device) - start, alpha=self.alpha)

    def release(self, learner: Learner) -> None:
        """Nothing of a task is needed after it."""
        self.start, self.marked = {}, {}

    def state_dict(self) -> State:
        """theta_v, once there is one; ``setup`` finds theta_start again."""
        return {"marked": dict(self.marked)}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.marked = dict(state["marked"])


def _weights(learner: Learner) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in learner.named_trainable().items()}
