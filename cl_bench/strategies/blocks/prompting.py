"""What methods that learn prompts have in common: a frozen network, queries, and prompts by sample.

A sample's query q (d,) is the network's features of it without prompts, in evaluation mode. What
prompts it reads follows from its own query alone, at test as in training, so that its answer does
not depend on what else is in a batch. Heads learn beside the prompts.
"""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from cl_bench.blocks import Prompted, Prompts, blocks_of, require_attention
from cl_bench.contracts import (
    CLASSIFIED,
    Batch,
    Learner,
    Loss,
    Needs,
    State,
    Strategy,
    Task,
    UsageError,
)
from cl_bench.contracts.options import shown
from cl_bench.strategies.logits import Logits, cross_entropy, open_heads, require_rivals


def hold_body(learner: Learner) -> None:
    """Until the next task, of the network itself nothing learns but heads."""
    heads = {name for name, role in learner.roles().items() if role == "head"}
    named = learner.network.named_parameters()
    learner.hold_others([p for name, p in named if name in heads], norms=False)


class Prompting(Strategy):
    """Learns prompts for a network that stays as it is.

    Args:
        logits: which classes compete while a task is learned.

    Attributes:
        begun: how many tasks have begun.
    """

    needs = Needs(modalities=CLASSIFIED, shardable=False, freezes_weights=True, adapts=True)

    def __init__(self, logits: Logits) -> None:
        self.logits = logits
        self.begun = 0
        self._classes: range | None = None
        self._prompted: Prompted | None = None
        self._pull: Tensor | None = None

    @abstractmethod
    def give(self, learner: Learner, query: Tensor) -> Prompts:
        """Prompts of samples with these queries (n, d)."""

    def pool(self, learner: Learner) -> nn.Module | None:
        """What pools the network's positions, where prompts are positions."""
        return None

    @property
    def passes(self) -> int:
        """One for the query, one for the answer."""
        return 2 if self.begun else 1

    def check(self, learner: Learner) -> None:
        """The network must have blocks whose attention can be added to.

        Raises:
            UsageError: it has none; or a class has none to compete with.
        """
        name = type(self).__name__
        require_rivals(learner, self.logits)
        require_attention(learner, blocks_of(learner, name), name)
        self.pool(learner)

    def check_elsewhere(self, promised: bool = False) -> None:
        """A query is the network's features of a whole batch, whose forward pass is ours alone."""
        raise UsageError(
            f"{type(self).__name__} has the network read prompts that follow from each batch, in "
            "cl_bench's own loop: python -m cl_bench +strategy=..."
        )

    def setup(self, learner: Learner, task: Task) -> None:
        """Freeze the network, and have it read prompts."""
        hold_body(learner)
        learner.train_heads("current")
        open_heads(learner, self.logits, old=self.logits == "seen")
        learner.hold(self.older(learner))
        self.begun = max(self.begun, task.index + 1)
        self._classes = task.classes if self.logits == "current" else None
        self._prompted = self._attached(learner)

    def older(self, learner: Learner) -> list[nn.Module]:
        """Modules of earlier tasks, which learn no more."""
        return []

    def _attached(self, learner: Learner) -> Prompted:
        def give(batch: Batch) -> Prompts:
            with torch.no_grad(), learner.evaluating():
                query = learner.features(batch)
            return self.give(learner, query)

        blocks = blocks_of(learner, type(self).__name__)
        return Prompted(learner, blocks, give, self.pool(learner))

    def objective(self, learner: Learner, batch: Batch, out: Tensor) -> Loss:
        """Cross-entropy, and what draws keys to queries."""
        loss = cross_entropy(learner, out, batch, self._classes)
        return loss if self._pull is None else Loss(loss.sum - self._pull.double(), loss.count)

    def predict(self, learner: Learner, batch: Batch, task: Task | None) -> Tensor:
        """Logits with each sample's own prompts, which are there while a task is learned anyway."""
        own = self._attached(learner) if self.begun and self._prompted is None else None
        try:
            return learner(batch)
        finally:
            self._pull = None
            if own is not None:
                own.remove()

    def release(self, learner: Learner) -> None:
        """No prompts."""
        if self._prompted is not None:
            self._prompted.remove()
        self._prompted = self._pull = None

    def state_dict(self) -> State:
        """How many tasks there were; the prompts are the learner's."""
        return {"begun": self.begun}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.begun = state["begun"]


def require_depth(learner: Learner, who: str, option: str, wanted: list[int]) -> None:
    """Raise :class:`UsageError` if one of the ``wanted`` blocks, from 0, is not there."""
    depth = len(blocks_of(learner, who))
    if any(i >= depth for i in wanted):
        raise UsageError(
            f"strategy.{option}={shown(wanted)}: the network has {depth} blocks, numbered from 0 "
            f"to {depth - 1}"
        )


def width_of(learner: Learner) -> int:
    """D, of the positions' vectors and of the network's features."""
    return blocks_of(learner, "a strategy of prompts")[0].width
