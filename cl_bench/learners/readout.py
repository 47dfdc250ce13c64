"""Heads: which there are, which train, and whose a layer is."""

from dataclasses import replace
from typing import Literal

from torch import Tensor, nn

from cl_bench.contracts import Protect, Task
from cl_bench.learners.network import NetworkServices
from cl_bench.subspace import LinearMap


class Readout(NetworkServices):
    """Mixin: the heads of a learner, called ``heads.<i>``.

    Attributes:
        heads: output layers, one for all tasks or one each.
        scenario: ``domain`` (one head), ``task`` or ``class``.
        task: that is learned; None before any.
        seen_heads: how many of the heads tasks have had so far.
    """

    heads: nn.ModuleList
    scenario: str
    task: Task | None
    seen_heads: int
    _held: set[Tensor]

    def is_guarded_head(self, name: str, heads: str) -> bool | None:
        """Whether ``protect.heads`` guards this layer; None if it is no head."""
        if not name.startswith("heads."):
            return None
        return heads == "always" or (heads == "auto" and self.scenario != "task")

    def layers(self, protect: Protect) -> list[LinearMap]:
        """The linear maps that ``protect`` selects.

        Heads that together are one read the same features, those of tasks to come included.

        Raises:
            UsageError: it selects none.
        """
        found = super().layers(protect)
        heads = (
            [m for m in found if m.name.startswith("heads.")] if self.scenario == "class" else []
        )
        return [replace(m, reads=heads[0].name) if m in heads[1:] else m for m in found]

    def is_own_head(self, name: str) -> bool:
        """Whether the layer or parameter belongs to a head that came with a task."""
        return name.startswith("heads.") and self.scenario != "domain"

    def is_foreign_head(self, name: str) -> bool:
        """Whether a parameter belongs to the head of another task than the one that is learned."""
        current = self.task.head if self.task else 0
        return self.is_own_head(name) and name.split(".")[1] != str(current)

    def train_heads(self, which: Literal["current", "seen"]) -> None:
        """Which output heads take part in training, apart from what is held in them."""
        current = self.task.head if self.task else 0
        for i, head in enumerate(self.heads):
            wanted = i < self.seen_heads if which == "seen" else i == current
            for parameter in head.parameters():
                free = self.learns(parameter) and parameter not in self._held
                parameter.requires_grad_(wanted and free)
