"""What replays samples of a reservoir beside every batch has in common."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cl_bench.contracts import (
    CLASSIFIED,
    Batch,
    FederatedStrategy,
    Learner,
    Loss,
    Needs,
    State,
    Task,
    derive_seed,
)
from cl_bench.contracts.options import Count
from cl_bench.strategies.logits import Logits, open_heads, require_rivals
from cl_bench.strategies.replay.buffer import Reservoir, as_in_training, size

DRAW = "draw"
"""Tensor of batches, int64 (n,): 0 for what is new, k for what the k-th draw brought."""


class Rehearsal(Reservoir, FederatedStrategy):
    """Keeps a reservoir of what was learned.

    Args:
        memory: samples kept, over all tasks.
        replay: samples replayed with every batch; None means as many as the batch holds.
    """

    private = True

    def __init__(self, memory: Count = 500, replay: Count | None = None) -> None:
        super().__init__(memory)
        self.replay = replay
        self.learned: list[Batch] = []  # since the last step

    @property
    def exemplars(self) -> int:
        """Samples in the reservoir."""
        return self.filled

    def setup(self, learner: Learner, task: Task) -> None:
        """Replayed samples need their own heads to learn along."""
        learner.train_heads("seen")
        self.learned = []
        self.begin(learner.seed)

    def after_step(self, learner: Learner, batch: Batch, out: Tensor) -> None:
        """Offer what was learned to the memory: what a step accumulates draws from one memory."""
        for learned in self.learned:
            self.offer(learned)
        self.learned.clear()

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        super().load_state_dict(state)
        self.learned = []


class ReplayTerms(Rehearsal):
    """Replays draws from the memory, each under a term of the loss of its own.

    Samples are kept without augmentation, which is drawn anew when they are replayed. New and old
    samples go through the network at once. L = L_0(new) + sum_k L_k(k-th draw), each a mean.

    Args:
        memory: samples kept, over all tasks.
        replay: samples of each draw; None means as many as the batch holds.
        logits: classes that compete in the terms, as the method says.

    Attributes:
        draws: how many there are beside each batch; with none, nothing is kept.
        sizes: samples of the latest batch that are new, and of each draw.
    """

    needs = Needs(modalities=CLASSIFIED, plain_view=True)
    draws = 1

    def __init__(self, memory: int, replay: int | None, logits: Logits) -> None:
        super().__init__(memory, replay)
        self.logits = logits
        self.sizes: list[int] = []

    def check(self, learner: Learner) -> None:
        """Classes must have something to compete with."""
        require_rivals(learner, self.logits)

    def term(self, k: int, learner: Learner, batch: Batch, out: Tensor) -> Loss:
        """L_k over samples of the k-th draw, or new ones (0)."""
        raise NotImplementedError

    def setup(self, learner: Learner, task: Task) -> None:
        """Heads of replayed samples learn along."""
        self.classes, self.data = task.classes, task.train
        self.learned, self.sizes = [], []
        self.begin(learner.seed)
        open_heads(learner, self.logits, old=self.draws > 0)

    def on_batch(self, learner: Learner, batch: Batch) -> Batch:
        """The batch and the draws."""
        new = {k: v for k, v in batch.items() if k != "plain"}
        self.sizes, drawn = [size(new)], []
        if self.draws and self.filled:
            for k in range(self.draws):
                seed = derive_seed(learner.seed, "replayed", self.seen, len(self.learned), k)
                kept = self.draw(self.replay or size(new))
                drawn.append(as_in_training(kept, self.data, seed))
            self.sizes += map(size, drawn)
        if self.draws:
            self.learned.append({**new, "x": batch["plain"]})
        return beside(new, drawn)

    def objective(self, learner: Learner, batch: Batch, out: Tensor) -> Loss:
        """The terms; of validation data, the first."""
        if DRAW not in batch or len(self.sizes) == 1:
            return self.term(0, learner, batch, out)
        found: list[Tensor] = []
        for k, whole in enumerate(self.sizes):  # of which other processes may have a part
            which = batch[DRAW] == k
            if which.any():
                part = {name: v[which] for name, v in batch.items()}
                found.append(self.term(k, learner, part, out[which]).sum * (self.sizes[0] / whole))
        return Loss(torch.stack(found).sum(), int((batch[DRAW] == 0).sum()))

    def release(self, learner: Learner) -> None:
        """The task's data is held no longer."""
        del self.data


def beside(new: Batch, draws: Sequence[Batch]) -> Batch:
    """A batch and draws from memory as one, with :data:`DRAW`; what new samples lack is zero."""
    device = new["y"].device
    parts = [new, *({k: v.to(device) for k, v in draw.items()} for draw in draws)]
    whole = {k: torch.cat([part[k] for part in parts]) for k in new}
    if draws:
        for k in draws[0].keys() - new.keys():
            old = torch.cat([part[k] for part in parts[1:]])
            whole[k] = torch.cat([old.new_zeros(size(new), *old.shape[1:]), old])
    number = [torch.full((size(part),), i, device=device) for i, part in enumerate(parts)]
    return {**whole, DRAW: torch.cat(number)}
