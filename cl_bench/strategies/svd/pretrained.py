"""What follows from whether a network is pre-trained, where nobody has said it."""

from collections.abc import Sequence
from typing import Literal

from cl_bench.contracts import Learner, Strategy


class ByPretraining(Strategy):
    """Which task is constrained first, and what else learns.

    Attributes:
        start_task: index of the first task that is constrained; None: 0 for a pre-trained network,
            else 1.
        train_rest: ``all``, ``norms`` or ``none``; ``auto``: norms of a pre-trained network, else
            all.
    """

    start_task: int | None
    train_rest: Literal["auto", "all", "norms", "none"]

    def first_constrained(self, learner: Learner) -> int:
        """Index of the first task that is constrained."""
        return int(not learner.pretrained) if self.start_task is None else self.start_task

    def learning_rest(self, learner: Learner) -> str:
        """What else learns: ``all``, ``norms`` or ``none``."""
        if self.train_rest != "auto":
            return self.train_rest
        return "norms" if learner.pretrained else "all"

    def remarks(self, learner: Learner) -> Sequence[str]:
        """From which task on it constrains what, where that follows from the network."""
        if self.start_task is not None and self.train_rest != "auto":
            return ()
        kind = "is pre-trained" if learner.pretrained else "begins with random weights"
        return [
            f"adaptive_svd: the network {kind}, so matrices are constrained from task "
            f"{self.first_constrained(learner) + 1} on, while of the rest "
            f"{self.learning_rest(learner)} learns (strategy.start_task, strategy.train_rest)"
        ]
