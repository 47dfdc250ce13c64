"""Experience Replay with a reservoir (Chaudhry et al., 2019, "On Tiny Episodic Memories").

Every batch is learned together with as many samples drawn from a memory that reservoir sampling
(Vitter, 1985) keeps uniform over everything seen.
"""

import torch
from torch import Tensor

from cl_bench.contracts import (
    LOCAL_OR_FEDERATED,
    Batch,
    FederatedStrategy,
    Learner,
    Needs,
    State,
    Task,
    generator,
)
from cl_bench.contracts.options import Count


class ER(FederatedStrategy):
    """Replays a few old samples with every batch.

    Args:
        memory: samples kept, over all tasks.
        replay: samples replayed with every batch; None means as many as the batch holds.
    """

    needs = Needs(engines=LOCAL_OR_FEDERATED)
    private = True

    def __init__(self, memory: Count = 500, replay: Count | None = None) -> None:
        self.memory = memory
        self.replay = replay
        self.buffer: Batch = {}
        self.filled = 0
        self.seen = 0
        self.rng: torch.Generator | None = None
        self._learned: list[Batch] = []

    def setup(self, learner: Learner, task: Task) -> None:
        """Replayed samples need their own heads to learn along."""
        learner.train_heads("seen")
        self._learned = []
        self.rng = self.rng or generator(learner.seed, "reservoir")

    def on_batch(self, learner: Learner, batch: Batch) -> Batch:
        """The batch and a draw from the memory."""
        assert self.rng is not None
        self._learned.append(batch)
        if not self.filled:
            return batch
        wanted = self.replay or size(batch)
        index = torch.randint(self.filled, (wanted,), generator=self.rng)
        return {k: torch.cat([v, self.buffer[k][index].to(v.device)]) for k, v in batch.items()}

    def after_step(self, learner: Learner, batch: Batch, out: Tensor) -> None:
        """Offer what was learned to the memory: what a step accumulates draws from one memory."""
        for learned in self._learned:
            self._offer(learned)
        self._learned.clear()

    def _offer(self, batch: Batch) -> None:
        """Reservoir sampling: the m-th sample seen takes slot j ~ U{0..m-1} if there is one."""
        if not self.buffer:
            self.buffer = {
                k: torch.zeros(self.memory, *v.shape[1:], dtype=v.dtype) for k, v in batch.items()
            }
        count = size(batch)
        order = torch.arange(self.seen, self.seen + count)
        uniform = torch.rand(count, generator=self.rng, dtype=torch.float64)
        slots = torch.where(order < self.memory, order, (uniform * (order + 1)).long())
        last_writer = {slot: i for i, slot in enumerate(slots.tolist()) if slot < self.memory}
        if last_writer:
            to, source = torch.tensor(list(last_writer)), torch.tensor(list(last_writer.values()))
            for k, v in batch.items():
                self.buffer[k][to] = v[source].cpu()
        self.seen += count
        self.filled = min(self.memory, self.seen)

    def state_dict(self) -> State:
        """The memory, what it has seen, and its random state."""
        rng: Tensor | None = None if self.rng is None else self.rng.get_state()
        return {"buffer": _copied(self.buffer), "seen": self.seen, "rng": rng}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.buffer, self.seen, self._learned = _copied(state["buffer"]), state["seen"], []
        self.filled = min(self.memory, self.seen)
        self.rng = None if state["rng"] is None else torch.Generator()
        if self.rng is not None:
            self.rng.set_state(state["rng"])


def _copied(buffer: Batch) -> Batch:
    """The memory is written in place; a state must not be."""
    return {k: v.clone() for k, v in buffer.items()}


def size(batch: Batch) -> int:
    """Number of samples in a batch."""
    return len(next(iter(batch.values())))
