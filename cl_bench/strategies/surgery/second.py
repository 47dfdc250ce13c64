"""Gradients of what old tasks want, beside that of the batch: what surgery works on."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from cl_bench.contracts import (
    CLASSIFIED,
    Batch,
    Learner,
    Needs,
    State,
    Statistics,
    Strategy,
    Task,
    generator,
)
from cl_bench.contracts.learner import Snapshot
from cl_bench.contracts.options import Count, Rate

Second = Literal["replay", "distillation", "memory"]

Gradients = dict[str, Tensor]
"""By the name of their parameter."""


class SecondObjectives(Strategy):
    """Keeps samples of every task and takes gradients of old tasks in training mode.

    Args:
        second: whose gradients join that of the batch: ``replay``, the loss of samples drawn from
            the memory; ``distillation``, what the network of before the task said of them;
            ``memory``, the loss of each old task's samples, a gradient a task.
        memory: samples kept of every task, drawn when it ends.
        reference: of them, drawn for a step's gradient; of ``memory``, of each task.
        temperature: of distillation.
    """

    needs = Needs(rewrites_gradients=True, shardable=False, modalities=CLASSIFIED)

    def __init__(
        self,
        second: Second = "replay",
        memory: Count = 256,
        reference: Count = 64,
        temperature: Rate = 2.0,
    ) -> None:
        self.second = second
        self.memory = memory
        self.reference = reference
        self.temperature = temperature
        self.kept: list[Batch] = []  # by task
        self.rng: torch.Generator | None = None
        self.teacher: Snapshot | None = None

    @property
    def exemplars(self) -> int:
        """Samples of all tasks."""
        return sum(map(_size, self.kept))

    def setup(self, learner: Learner, task: Task) -> None:
        """Old samples are answered by heads of their own."""
        learner.train_heads("seen")
        self.rng = self.rng or generator(learner.seed, "second objective")
        distils = bool(self.kept) and self.second == "distillation"
        self.teacher = learner.snapshot() if distils else None

    def main(self, learner: Learner) -> Gradients:
        """The batch's gradient, of parameters that have one: the network's own tensors."""
        trained = learner.named_trainable().items()
        return {name: p.grad for name, p in trained if p.grad is not None}

    def others(self, learner: Learner) -> list[Gradients]:
        """Of old tasks, at the current weights; none while the first task is learned."""
        if not self.kept:
            return []
        if self.second == "memory":
            batches = [self.drawn([batch]) for batch in self.kept]
            return [learner.gradients(batch, mode="train") for batch in batches]
        batch = self.drawn(self.kept)
        if self.teacher is None:
            return [learner.gradients(batch, mode="train")]
        said = self.teacher(batch)

        def apart(out: Tensor, _: Batch) -> Tensor:
            return divergence(out[:, : said.shape[1]], said, self.temperature)

        return [learner.gradients(batch, of=apart, mode="train")]

    def drawn(self, batches: Sequence[Batch]) -> Batch:
        """Samples of all of them together."""
        whole = {k: torch.cat([batch[k] for batch in batches]) for k in batches[0]}
        chosen = torch.randperm(_size(whole), generator=self.rng)[: self.reference]
        return {k: v[chosen] for k, v in whole.items()}

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """A part of the task joins the memory."""
        self.kept.append(task.sample(self.memory, learner.seed))

    def release(self, learner: Learner) -> None:
        """The network of before is of no use any more."""
        self.teacher = None

    def state_dict(self) -> State:
        """The memory, and the random state of what is drawn from it."""
        rng = None if self.rng is None else self.rng.get_state()
        return {"kept": [dict(batch) for batch in self.kept], "rng": rng}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.kept, self.rng = [dict(batch) for batch in state["kept"]], None
        if state["rng"] is not None:
            self.rng = torch.Generator()
            self.rng.set_state(state["rng"])


def divergence(new: Tensor, old: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy of softmax(new / T) under softmax(old / T), over classes that old knows.

    Logits of classes that are left out are minus infinity, in either.
    """
    known = ~(old.isinf() | new.isinf())
    out = -torch.inf
    wanted = (old.to(new) / temperature).masked_fill(~known, out).softmax(1)
    said = (new / temperature).masked_fill(~known, out).log_softmax(1).masked_fill(~known, 0.0)
    return -(wanted * said).sum(1).mean()


def product(a: Gradients, b: Gradients) -> Tensor:
    """Of all entries together, over the parameters of ``a``."""
    return torch.stack([(a[name] * b[name]).sum() for name in a]).sum()


def parts(main: Gradients, scope: Literal["global", "layer"]) -> list[Gradients]:
    """What one product goes over: everything, or each parameter by itself."""
    return [main] if scope == "global" else [{name: g} for name, g in main.items()]


def _size(batch: Batch) -> int:
    return len(next(iter(batch.values())))
