"""What heads in closed form have in common: a network that stays as it is, and sums over samples.

With h(x) (M,) what a head reads of a sample, kept are for every class c

    n_c, the number of its samples,  s_c = sum h(x)

and, for heads that ask for it, G = sum h(x) h(x)^T over all classes. Sums are the same for any
division of the samples among batches, tasks, processes and clients, and in any order; where a
class comes again (domain-incremental streams), its samples are pooled.
"""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from cl_bench.contracts import (
    CLASSIFIED,
    LOCAL_OR_FEDERATED,
    Batch,
    FederatedStrategy,
    Learner,
    Needs,
    Plan,
    State,
    Statistics,
    Stream,
    Task,
    UsageError,
    batch_sizes,
)
from cl_bench.subspace import add_gram, block_rows

ROWS = 1024
"""Of h that are in memory at once."""


class ClosedForm(FederatedStrategy):
    """Answers by what the sums say; the network learns the first task, or nothing.

    Args:
        epochs: of the first task; None takes the run's.

    Attributes:
        counts: (parts, C) float64, n_c; C grows.
        sums: (parts, C, M) float64, s_c.
        grams: (parts, M, M) float64, G but for blocks above the diagonal; empty if none is kept.
    """

    needs = Needs(engines=LOCAL_OR_FEDERATED, modalities=CLASSIFIED)

    parts: int = 1
    """Kinds of samples that are summed apart (:meth:`part_of`)."""

    squares: ClassVar[bool] = False
    """Whether G is kept."""

    def __init__(self, epochs: int | None) -> None:
        self.epochs = epochs
        self.counts = torch.zeros(self.parts, 0, dtype=torch.float64)
        self.sums = self.grams = torch.zeros(self.parts, 0, 0, dtype=torch.float64)

    @abstractmethod
    def scores(self, h: Tensor, classes: list[int]) -> Tensor:
        """Logits (n, len(classes)) of samples ``h`` (n, M)."""

    def read(self, learner: Learner, batch: Batch) -> Tensor:
        """H (n, M) of a batch: the network's features."""
        return learner.features(batch)

    def part_of(self, batch: Batch) -> Tensor:
        """Of which kind each sample is, int64 (n,); a function of the sample alone."""
        return torch.zeros_like(batch["y"])

    def check(self, learner: Learner) -> None:
        """If the first task is to be learned, the network must have something that is used.

        Raises:
            UsageError: it has nothing but heads.
        """
        if self.epochs != 0 and set(learner.roles().values()) <= {"head"}:
            raise UsageError(
                f"strategy.epochs: the network has nothing but heads to train, and "
                f"{type(self).__name__} answers by a head of its own; set strategy.epochs=0, or "
                "use a model=... with layers below its heads"
            )

    def plan(self, stream: Stream, t: int) -> Plan:
        """The first task may train the network; no other does."""
        return Plan(stream[t].train, epochs=self.epochs if t == 0 else 0)

    @torch.no_grad()
    def collect(self, learner: Learner, task: Task) -> Statistics:
        """The task's ``counts`` (parts, c), ``sums`` (parts, c, M) and, if kept, ``grams``."""
        cells = self.parts * len(task.classes)
        counts = torch.zeros(cells, dtype=torch.float64)
        sums = grams = torch.empty(0)
        data, least = task.train, learner.least_batch
        with learner.evaluating():
            for rows in torch.split(torch.arange(len(data)), batch_sizes(len(data), ROWS, least)):
                found = []
                for index in torch.split(rows, batch_sizes(len(rows), learner.batch_size, least)):
                    batch = data[index]
                    h, part = self.read(learner, batch).double().cpu(), self.part_of(batch)
                    found.append((h, part, batch["y"] - task.classes.start))
                h, part, y = (torch.cat(values) for values in zip(*found, strict=True))
                if not sums.numel():
                    sums = h.new_zeros(cells, h.shape[1])
                    grams = h.new_zeros(self.parts, h.shape[1], h.shape[1] * self.squares)
                cell = part * len(task.classes) + y
                counts.index_add_(0, cell, torch.ones(len(h), dtype=torch.float64))
                sums.index_add_(0, cell, h)
                for i in range(self.parts * self.squares):
                    add_gram(grams[i], h[part == i])
        shape = (self.parts, len(task.classes))
        found_sums: Statistics = {"counts": counts.view(shape), "sums": sums.view(*shape, -1)}
        return {**found_sums, "grams": grams} if self.squares else found_sums

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """The sums of the task's classes join those that are there."""
        new = {name: torch.as_tensor(value).cpu() for name, value in stats.items()}
        self.counts = _joined(self.counts, new["counts"], task.classes)
        self.sums = _joined(self.sums, new["sums"], task.classes)
        if self.squares:
            self.grams = self.grams.add_(new["grams"]) if self.grams.numel() else new["grams"]

    def predict(self, learner: Learner, batch: Batch, task: Task | None) -> Tensor:
        """Logits (n, C); before any task what the network says."""
        seen = self.counts.sum(0).tolist()
        if not any(seen):
            return learner(batch)
        h = self.read(learner, batch)
        known = [c for c, n in enumerate(seen) if n and (task is None or c in task.classes)]
        logits = h.new_full((len(h), len(seen)), -torch.inf)
        logits[:, known] = self.scores(h, known).to(h)
        return logits

    def state_dict(self) -> State:
        """The sums; of G what is kept."""
        M = self.grams.shape[1]
        grams = [self.grams[:, rows, columns].contiguous() for rows, columns in block_rows(M)]
        return {"counts": self.counts, "sums": self.sums, "grams": grams}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.counts, self.sums = state["counts"], state["sums"]
        M = self.sums.shape[2] if state["grams"] else 0
        self.grams = self.sums.new_zeros(self.parts, M, M)
        for part, (rows, columns) in zip(state["grams"], block_rows(M), strict=True):
            self.grams[:, rows, columns] = part


def _joined(old: Tensor, new: Tensor, classes: range) -> Tensor:
    """Sums by class (parts, C, ...) with those of ``classes`` added."""
    parts, C = old.shape[:2]
    found = new.new_zeros(parts, max(C, classes.stop), *new.shape[2:])
    if C:
        found[:, :C] = old
    found[:, classes.start : classes.stop] += new
    return found
