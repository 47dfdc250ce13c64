"""Continual unlearning by one orthogonal low-rank adapter and a gate (repository O3 @ 839afea).

Requests are learned with wrong answers by a pair (A, B) on top of frozen weights, which goes on
from one request to the next while it is kept from what it read before:

    loss + strength / layers * sum_layers sum_(earlier requests i) |A_i A^T|_F^2.

Since A begins as A_i, the penalty begins at its largest. The base is never touched: where the gate
is shut, outputs are the base's to the bit.

Theirs gates every input softly, by a detector of each request: an encoder trained by masked words
and the entropy of its similarity to a frozen copy, scored layer by layer (Mahalanobis distance and
cosine), a one-class SVM on these scores, and the tail of a mixture of two Gaussians that is fitted
on scores of *test* data, with thresholds set by hand for each data set. That is described here and
not built. ``gate: oracle`` is told whose data it answers for, and opens for requests alone: it is
the best that any detector could do. Their code penalises absolute sums; this is the squared norm.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cl_bench.contracts import Batch, Learner, Needs, State, Statistics, Task, generator
from cl_bench.contracts.options import Count, PartShare, Rate, Strength
from cl_bench.strategies.lowrank.pairs import LowRankPairs
from cl_bench.strategies.unlearning.relabelled import relabelled

Gate = Literal["oracle", "open"]
"""Who is answered through the adapter."""


class O3(LowRankPairs):
    """Learns tasks as they come, requests in an adapter behind a gate.

    Args:
        strength: of the penalty.
        gate: ``oracle`` opens for data of requests, ``open`` always, once there was one.
        rank, alpha, dropout, targets: as in :class:`LowRankPairs`.
    """

    needs = Needs(
        modalities=frozenset({"text"}),
        freezes_weights=True,
        adapts=True,
        forgets=True,
        task_id_at_test=True,
        options={"task_id_at_test": "gate"},
    )

    def __init__(
        self,
        strength: Strength = 0.1,
        gate: Gate = "oracle",
        rank: Count = 8,
        alpha: Rate = 32.0,
        dropout: PartShare = 0.1,
        targets: Sequence[str] | Literal["all"] | None = "all",
    ) -> None:
        super().__init__(rank, alpha, dropout, targets)
        self.strength, self.gate = strength, gate
        if gate == "open":  # nobody need tell whose data it is
            self.needs = replace(self.needs, task_id_at_test=False)
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}  # A (r, d), B (o, r) of every layer
        self.drawn = 0
        self._task: Task | None = None

    def footprint(self, learner: Learner, tasks: int, processes: int) -> None:
        """It does not say."""
        return

    def setup(self, learner: Learner, task: Task) -> None:
        """A request's pair goes on from where the last one's ended."""
        self._task = task if task.kind == "forget" else None
        if self._task is None:
            return
        super().setup(learner, task)
        with torch.no_grad():
            for name, (A, B) in self.pairs.items():
                for weight, kept in zip(self._weights(name), (A, B), strict=True):
                    weight.copy_(kept)

    def on_batch(self, learner: Learner, batch: Batch) -> Batch:
        """Wrong answers to a request."""
        if self._task is None:
            return batch
        self.drawn += 1
        rng = generator(learner.seed, "relabel", self.drawn)
        return relabelled(batch, self._task.classes, rng)

    def penalty(self, learner: Learner, batch: Batch, out: Tensor) -> Tensor | None:
        """Strength / layers sum |A_i A^T|_F^2."""
        if not self.layers or not self.past:
            return None
        products = torch.stack([product.square().sum() for product in self._products()])
        return self.strength * products.mean()

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """Remember the pair."""
        if self._task is None:
            return
        super().consolidate(learner, task, stats)
        for name in self.layers:
            A, B = (weight.detach().clone() for weight in self._weights(name))
            self.pairs[name] = A, B

    @property
    def adapters(self) -> int:
        """The pair."""
        return int(bool(self.pairs))

    def release(self, learner: Learner) -> None:
        """The base is what it was: nothing is merged."""
        if self.attached is not None:
            self.attached.drop()
        self.attached, self.layers = None, {}

    @contextmanager
    def inference(self, learner: Learner, task: Task | None) -> Iterator[None]:
        """Behind an open gate, what the pair adds."""
        shut = self.gate == "oracle" and (task is None or task.kind != "forget")
        if shut or not self.pairs or self.layers:  # the last: PEFT's own are in place
            yield
            return
        scale = self.alpha / self.rank
        with ExitStack() as stack:
            for name, (A, B) in self.pairs.items():
                layer = learner.network.get_submodule(name)
                stack.enter_context(_adding(layer, A, scale * B))
            yield

    def state_dict(self) -> State:
        """The family's, the pair, and how many batches were relabelled."""
        pairs = {name: list(pair) for name, pair in self.pairs.items()}
        return {**super().state_dict(), "pairs": pairs, "drawn": self.drawn}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        super().load_state_dict(state)
        self.pairs = {name: (A, B) for name, (A, B) in state["pairs"].items()}
        self.drawn = state["drawn"]

    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """The pair's rank, and how far the latest A overlaps with those before."""
        found = super().metrics()
        return {name: {**values, "lora_rank": self.rank} for name, values in found.items()}


@contextmanager
def _adding(layer: nn.Module, A: Tensor, B: Tensor) -> Iterator[None]:
    """Inside, B A x is added to what the layer puts out for x."""

    def add(module: nn.Module, given: tuple[Any, ...], out: Tensor) -> Tensor:
        x: Tensor = given[0]
        return out + x @ A.to(x).t() @ B.to(x).t()

    handle = layer.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
