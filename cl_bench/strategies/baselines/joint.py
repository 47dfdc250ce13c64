"""Joint training: at task t, learn all tasks up to t together.

The upper bound, and the reference of intransigence (Chaudhry et al., ECCV 2018): at every t a model
trained on the union of D_1 ... D_t.
"""

from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from cl_bench.contracts import (
    Batch,
    Data,
    Learner,
    Memory,
    Plan,
    Strategy,
    Stream,
    Task,
    UsageError,
    augmented,
    derive_seed,
)


class Joint(Strategy):
    """Trains on the union of everything seen.

    Args:
        fresh: start every task from the initial weights; otherwise go on from the last ones.
        when: ``every`` task, which the diagonal of the matrix and intransigence need, or only
            the ``last`` one, which is enough for the final accuracy.
    """

    bound = "upper"

    def __init__(self, fresh: bool = True, when: Literal["every", "last"] = "every") -> None:
        self.fresh = fresh
        self.when = when

    def plan(self, stream: Stream, t: int) -> Plan | None:
        """The union of the first t + 1 tasks."""
        if self.when == "last" and t < len(stream) - 1:
            return None
        return Plan(Union([task.train for task in stream[: t + 1]]))

    def footprint(self, learner: Learner, tasks: int, processes: int) -> Memory:
        """Nothing beside the network; data is where it is."""
        return Memory()

    def setup(self, learner: Learner, task: Task) -> None:
        """Fresh weights, and every head that has been seen takes part."""
        if self.fresh:
            learner.reset_weights()
        learner.train_heads("seen")


class Union(Data):
    """Several data sets one after another."""

    def __init__(self, parts: list[Data]) -> None:
        self.parts = parts
        self.starts = [0, *accumulate(len(part) for part in parts)]

    def __len__(self) -> int:
        return self.starts[-1]

    def augmented(self, seed: int) -> "Union | None":
        """Every part as an epoch of training sees it.

        Raises:
            UsageError: that is as it is for some parts only.
        """
        views = [augmented(part, derive_seed(seed, "part", i)) for i, part in enumerate(self.parts)]
        known = [view for view in views if view is not None]
        if known and len(known) < len(views):
            raise UsageError(
                "some tasks of the stream are augmented in training and others are not, so that "
                "they have no common batches: augment all of them or none"
            )
        return Union(known) if known else None

    def __getitem__(self, index: Tensor) -> Batch:
        owner = torch.bucketize(index, torch.tensor(self.starts[1:]), right=True)
        order = owner.argsort(stable=True)
        pieces = [
            self.parts[part][index[owner == part] - self.starts[part]]
            for part in torch.unique(owner).tolist()
        ]
        back = order.argsort()
        return {k: torch.cat([piece[k] for piece in pieces])[back] for k in pieces[0]}
