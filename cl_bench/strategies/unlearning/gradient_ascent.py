"""Unlearning by gradient ascent: the loss on what is to be forgotten goes up, to a limit."""

import torch
from torch import Tensor

from cl_bench.contracts import Batch, Learner, Loss, Needs, Strategy, Task
from cl_bench.contracts.options import Rate


class GradientAscent(Strategy):
    """Learns tasks as they come; climbs the loss of requests.

    Args:
        limit: a batch's mean loss beyond which it is not climbed further. Without one the weights
            run away: the loss has no upper end. Ours.
    """

    needs = Needs(forgets=True)

    def __init__(self, limit: Rate = 6.0) -> None:
        self.limit = limit
        self.forgetting = False

    def setup(self, learner: Learner, task: Task) -> None:
        """Which kind of task it is."""
        self.forgetting = task.kind == "forget"

    def objective(self, learner: Learner, batch: Batch, out: Tensor) -> Loss:
        """The loss, or its negative while that is below the limit."""
        loss = learner.total_loss(out, batch)
        if not self.forgetting:
            return loss
        most = self.limit * torch.as_tensor(loss.count, dtype=loss.sum.dtype)
        return Loss(-torch.minimum(loss.sum, most.to(loss.sum.device)), loss.count)
