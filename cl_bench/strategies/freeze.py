"""Freezing the bottom of the network (Zheng et al., ICLR 2025, "Spurious Forgetting").

From the second task on, the first n blocks keep their weights bit for bit; what lies above them
re-aligns.
"""

from cl_bench.contracts import Learner, Strategy, Task, UsageError


class Freeze(Strategy):
    """Keeps the ``n_blocks`` blocks next to the input as they were.

    Args:
        n_blocks: how many blocks, counted from the input by index.
        start_task: index of the first task that they are frozen for.
    """

    def __init__(self, n_blocks: int = 1, start_task: int = 1) -> None:
        if n_blocks < 0 or start_task < 0:
            raise UsageError(
                f"strategy.n_blocks={n_blocks}, strategy.start_task={start_task}: both count from 0"
            )
        self.n_blocks = n_blocks
        self.start_task = start_task

    def setup(self, learner: Learner, task: Task) -> None:
        """Freeze before the optimizer is built, so that it holds no state for them."""
        blocks = learner.blocks()
        if self.n_blocks > len(blocks):
            raise UsageError(
                f"strategy.n_blocks={self.n_blocks}: the network has {len(blocks)} blocks"
            )
        if task.index >= self.start_task:
            learner.hold(blocks[: self.n_blocks])
