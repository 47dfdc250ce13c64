"""WA: weight aligning (Zhao et al., CVPR 2020; github.com/G-U-N/PyCIL @ f3509b8).

A task is learned with exemplars and (1 - l) CE + l KD, l = old classes / all classes. Then the rows
of the new classes in the output layer are made as long as the old ones (Eq. 5):

    W_new <- gamma W_new,   gamma = mean |w_old| / mean |w_new|
"""

import torch
from torch import Tensor

from cl_bench.contracts import Batch, Learner, Loss, Statistics, Task
from cl_bench.contracts.options import Count, Rate
from cl_bench.strategies.replay.classwise import Classwise, Select


class WA(Classwise):
    """Replay and distillation, then rows of one length.

    Args:
        memory: samples kept, over all classes.
        select: which of a class.
        temperature: of the distillation.
        squared: whether it is multiplied by temperature^2.
    """

    def __init__(
        self,
        memory: Count = 2000,
        select: Select = "herding",
        temperature: Rate = 2.0,
        squared: bool = False,
    ) -> None:
        super().__init__(memory, select)
        self.temperature = temperature
        self.squared = squared

    def objective(self, learner: Learner, batch: Batch, out: Tensor) -> Loss:
        """(1 - l) CE + l KD."""
        said = self.teacher(batch)[:, : self.old] if self.teacher else None
        return self.weighed(learner, batch, out, said)

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """Align, and choose exemplars."""
        if self.old:
            weights, roles = learner.weights(), learner.roles()
            heads = [n for n, role in roles.items() if role == "head" and weights[n].dim() == 2]
            old = torch.cat([weights[n] for n in heads[: task.head]])
            new = weights[heads[task.head]]
            gamma = old.norm(dim=1).mean() / new.norm(dim=1).mean()
            learner.load_weights({**weights, heads[task.head]: gamma * new})
        super().consolidate(learner, task, stats)
