"""PackNet (Mallya & Lazebnik, CVPR 2018): every task owns some weights of each layer, for good.

A task trains the weights that nobody owns; then the smallest of each layer are set to zero and left
to later tasks, and the others, the task's own, are fine-tuned. At test a task sees them and those
of earlier tasks.

The rule follows github.com/arunmallya/packnet; we have not checked the paper's text. That code only
zeroes gradients, so weight decay and momentum go on to move what is owned; here it is put back
after every step, bit for bit.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated

import torch
from torch import Tensor, nn

from cl_bench.contracts import (
    Batch,
    Learner,
    Needs,
    Phase,
    Protect,
    State,
    Statistics,
    Strategy,
    Task,
)
from cl_bench.contracts.options import Index, Range


class PackNet(Strategy):
    """Shares the weights of every linear and convolutional layer out among the tasks.

    Heads that one task each learns are left alone. All else that tasks share (biases,
    normalisation, embeddings) trains on the first task only.

    Args:
        prune: share of a task's weights in each layer that is left to later tasks, rounded down.
        finetune_epochs: epochs that the rest is trained on after that.
    """

    needs = Needs(task_id_at_test=True, rewrites_gradients=True, shardable=False)

    def __init__(
        self, prune: Annotated[float, Range(above=0, below=1)] = 0.5, finetune_epochs: Index = 1
    ) -> None:
        self.prune, self.finetune_epochs = prune, finetune_epochs
        self.index = -1  # of the task that was begun last
        self.owner: dict[str, Tensor] = {}  # by weight: 0 nobody's, else 1 + the task's index
        self.weights: dict[str, nn.Parameter] = {}
        self.fixed: dict[str, tuple[Tensor, Tensor]] = {}  # in this stage: which, and their values

    def targets(self, learner: Learner) -> dict[str, nn.Parameter]:
        """The weights that are shared out, by name."""
        own = {layer.weight for layer in learner.layers(Protect())}
        return {n: p for n, p in learner.network.named_parameters() if p in own}

    def guarded(self, learner: Learner) -> frozenset[str]:
        """The weights, and what the first task alone trains."""
        kept = set(learner.others(self.targets(learner).values(), norms=False))
        later = frozenset(n for n, p in learner.network.named_parameters() if p in kept)
        return later | learner.guarded(Protect(bias="frozen"))

    def setup(self, learner: Learner, task: Task) -> None:
        """What nobody owns is free to train."""
        self.weights, self.index, self.fixed = self.targets(learner), task.index, {}
        if self.owner:
            learner.hold_others(self.weights.values(), norms=False)
        else:
            of = self.weights.items()
            self.owner = {n: torch.zeros_like(p.detach(), dtype=torch.int16) for n, p in of}

    def constrain(self, learner: Learner) -> None:
        """Only the task's own weights get gradients: once pruned those it kept, before all free."""
        for name, p in self.weights.items():
            if name not in self.fixed:
                owner = self.owner[name].to(p.device)
                mine = owner == self.index + 1
                fixed = ~mine if bool(mine.any()) else owner != 0
                self.fixed[name] = fixed, p.detach().clone()
            if p.grad is not None:
                p.grad.masked_fill_(self.fixed[name][0], 0.0)

    def after_step(self, learner: Learner, batch: Batch, out: Tensor) -> None:
        """Put the others back, which momentum, Adam and weight decay may have moved."""
        for name, (where, values) in self.fixed.items():
            p = self.weights[name].detach()
            p.copy_(torch.where(where, values, p))

    def phases(self, learner: Learner, task: Task) -> Sequence[Phase]:
        """Pruning, then fine-tuning of what is left."""
        if not self.finetune_epochs:
            return ()
        how = (task.train, self.finetune_epochs, self.param_groups)
        return [Phase("finetune", *how, prepare=self.share_out)]

    def share_out(self, learner: Learner) -> None:
        """The larger of the free weights are the task's own from now on, the smaller ones zero."""
        for name, p in self.weights.items():
            owner = self.owner[name] = self.owner[name].to(p.device)
            free = (owner == 0).flatten().nonzero().squeeze(1)
            ascending = free[p.detach().flatten()[free].abs().argsort(stable=True)]
            own = torch.zeros_like(owner, dtype=torch.bool).flatten()
            own[ascending[int(self.prune * len(free)) :]] = True
            p.detach().masked_fill_((owner == 0) & ~own.view_as(owner), 0.0)
            owner[own.view_as(owner)] = self.index + 1
        self.fixed = {}

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """Pruning, where nothing is fine-tuned."""
        if not self.finetune_epochs:
            self.share_out(learner)

    @contextmanager
    def inference(self, learner: Learner, task: Task | None) -> Iterator[None]:
        """Hide the weights of later tasks, and of a later one that is learned just now."""
        index, before = -1 if task is None else task.index, {}
        if 0 <= index <= self.index and self.owner:
            for name, p in self.targets(learner).items():
                owner, before[p] = self.owner[name].to(p.device), p.detach().clone()
                later = (owner > index + 1) | ((owner == 0) & (index < self.index))
                p.detach().masked_fill_(later, 0.0)
        try:
            yield
        finally:
            for p, values in before.items():
                p.detach().copy_(values)

    def release(self, learner: Learner) -> None:
        """The task is over."""
        self.weights, self.fixed = {}, {}

    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """The share of every layer's weights that nobody owns."""
        return {
            name.removesuffix(".weight"): {"capacity_left": float((owner == 0).double().mean())}
            for name, owner in self.owner.items()
        }

    def state_dict(self) -> State:
        """Who owns what, and the task that was begun last."""
        return {"owner": {n: owner.clone() for n, owner in self.owner.items()}, "index": self.index}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.owner = {n: owner.clone() for n, owner in state["owner"].items()}
        self.fixed, self.index = {}, state["index"]
