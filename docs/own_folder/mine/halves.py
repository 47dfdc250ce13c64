"""Random masks: no paper, an example of the smallest strategy there can be."""

import torch

from cl_bench.contracts import Learner, Needs, Strategy, Task, UsageError, generator


class Halves(Strategy):
    """Every task may move its own random share of the weights.

    Args:
        share: of every tensor, in (0, 1].
    """

    needs = Needs(rewrites_gradients=True)

    def __init__(self, share: float = 0.5) -> None:
        if not 0.0 < share <= 1.0:
            raise UsageError(f"strategy.share={share}: a share lies in (0, 1]")
        self.share = share

    def setup(self, learner: Learner, task: Task) -> None:
        """Draw the masks; a resumed run draws them again."""
        rng = generator(learner.seed, "halves", task.index)
        self.masks = {
            name: torch.rand(p.shape, generator=rng) < self.share
            for name, p in learner.named_trainable().items()
        }

    def constrain(self, learner: Learner) -> None:
        """Only what the mask shows moves."""
        for name, p in learner.named_trainable().items():
            if p.grad is not None:
                p.grad *= self.masks[name].to(p.device)
