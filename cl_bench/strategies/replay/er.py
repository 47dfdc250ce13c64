"""Experience Replay with a reservoir (Chaudhry et al., 2019, "On Tiny Episodic Memories").

Every batch is learned together with as many samples drawn from a memory that reservoir sampling
(Vitter, 1985) keeps uniform over everything seen.
"""

import torch

from cl_bench.contracts import LOCAL_OR_FEDERATED, Batch, Learner, Needs, Task
from cl_bench.contracts.options import Count
from cl_bench.strategies.logits import Asked, open_heads
from cl_bench.strategies.replay.buffer import size
from cl_bench.strategies.replay.rehearsal import Rehearsal


class ER(Rehearsal):
    """Replays a few old samples with every batch.

    Args:
        memory: samples kept, over all tasks.
        replay: samples replayed with every batch; None means as many as the batch holds.
        logits: classes that compete: those seen so far, or those of tasks to come as well.
    """

    needs = Needs(engines=LOCAL_OR_FEDERATED)

    def __init__(
        self, memory: Count = 500, replay: Count | None = None, logits: Asked = "seen"
    ) -> None:
        super().__init__(memory, replay)
        self.logits = logits

    def setup(self, learner: Learner, task: Task) -> None:
        """As always, with the heads that the loss asks for."""
        super().setup(learner, task)
        open_heads(learner, self.logits, old=True)

    def on_batch(self, learner: Learner, batch: Batch) -> Batch:
        """The batch and a draw from the memory."""
        self.learned.append(batch)
        if not self.filled:
            return batch
        drawn = self.draw(self.replay or size(batch))
        return {k: torch.cat([v, drawn[k].to(v.device)]) for k, v in batch.items()}
