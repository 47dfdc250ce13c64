"""ER-ACE: experience replay with asymmetric cross-entropy (Caccia et al., ICLR 2022).

    L = CE over the classes of the batch (f(x), y) + CE(f(x'), y')

New samples do not push down classes that they are not of; samples x' from a reservoir hold all
classes apart.
"""

import torch
from torch import Tensor

from cl_bench.contracts import Batch, Learner, Loss
from cl_bench.contracts.options import Count
from cl_bench.strategies.logits import Asked, cross_entropy, present
from cl_bench.strategies.replay.rehearsal import DRAW, ReplayTerms


class ERACE(ReplayTerms):
    """Replay, with new samples among their own classes.

    Args:
        memory: samples kept, over all tasks.
        replay: samples replayed with every batch; None means as many as the batch holds.
        logits: classes that compete where old samples are replayed: those seen so far or, as in
            mammoth @ e75a491, those of tasks to come as well, then for new samples too.
    """

    def __init__(
        self, memory: Count = 500, replay: Count | None = None, logits: Asked = "all"
    ) -> None:
        super().__init__(memory, replay, logits)

    def on_batch(self, learner: Learner, batch: Batch) -> Batch:
        """The batch and a draw; what classes it has is known of the whole batch."""
        self.present = torch.unique(batch["y"])
        return super().on_batch(learner, batch)

    def term(self, k: int, learner: Learner, batch: Batch, out: Tensor) -> Loss:
        """Of new samples among their classes; of old ones among all."""
        if k == 0:
            classes = self.present if DRAW in batch else torch.unique(batch["y"])
            out = present(out, classes, self.classes.stop)
        return cross_entropy(learner, out, batch, None)
