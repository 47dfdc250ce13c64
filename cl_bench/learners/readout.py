"""Heads: which there are, which train, and whose a layer is."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from cl_bench.contracts import Protect, Task, UsageError
from cl_bench.contracts.learner import Heads
from cl_bench.learners.network import NetworkServices
from cl_bench.subspace import LinearMap


class Readout(NetworkServices):
    """Mixin: the heads of a learner; where :meth:`head_of` is not told otherwise, ``heads.<i>``.

    Attributes:
        heads: output layers, one for all tasks or one each.
        scenario: ``domain`` (one head), ``task`` or ``class``.
        task: that is learned; None before any.
        seen_heads: how many of the heads tasks have had so far.
        open_heads: whether heads of tasks to come take part in training.
    """

    heads: nn.ModuleList
    scenario: str
    task: Task | None
    seen_heads: int
    open_heads: bool = False
    _held: set[Tensor]

    def head_of(self, name: str) -> int | None:
        """Which head a layer or parameter belongs to, by its name; None: to none."""
        return int(name.split(".")[1]) if name.startswith("heads.") else None

    def readout(self, features: Tensor, heads: Heads = "seen") -> Tensor:
        """Logits (n, classes) of those heads, side by side.

        Raises:
            UsageError: there is no such head.
        """
        wanted = self._wanted(heads)
        if len(wanted) == 1:
            logits: Tensor = wanted[0](features)
            return logits
        return torch.cat([head(features) for head in wanted], dim=-1)

    def _wanted(self, heads: Heads) -> list[nn.Module]:
        known, seen = list(self.heads), max(1, self.seen_heads)
        named = {"current": [self.task.head if self.task else 0], "seen": range(seen)}
        named["all"] = range(len(known))
        numbers = named.get(heads) if isinstance(heads, str) else [heads]
        if numbers is None or not all(0 <= number < len(known) for number in numbers):
            raise UsageError(
                f"heads={heads!r}: choose 'current', 'seen', 'all' or a number from 0 to "
                f"{len(known) - 1}"
            )
        return [known[number] for number in numbers]

    def _head_parameters(self) -> frozenset[Tensor]:
        return frozenset(self.heads.parameters())

    def is_guarded_head(self, name: str, heads: str) -> bool | None:
        """Whether ``protect.heads`` guards this layer; None if it is no head."""
        if self.head_of(name) is None:
            return None
        return heads == "always" or (heads == "auto" and self.scenario != "task")

    def layers(self, protect: Protect) -> list[LinearMap]:
        """The linear maps that ``protect`` selects.

        Heads that together are one read the same features, those of tasks to come included.

        Raises:
            UsageError: it selects none.
        """
        found = super().layers(protect)
        classwise = self.scenario == "class"
        heads = [m for m in found if self.head_of(m.name) is not None] if classwise else []
        return [replace(m, reads=heads[0].name) if m in heads[1:] else m for m in found]

    def is_own_head(self, name: str) -> bool:
        """Whether the layer or parameter belongs to a head that came with a task."""
        return self.head_of(name) is not None and self.scenario != "domain"

    def is_foreign_head(self, name: str) -> bool:
        """Whether a parameter belongs to the head of another task than the one that is learned."""
        current = self.task.head if self.task else 0
        return self.is_own_head(name) and self.head_of(name) != current

    def train_heads(self, which: Literal["current", "seen", "all"]) -> None:
        """Which output heads take part in training, apart from what is held in them."""
        current = self.task.head if self.task else 0
        self.open_heads = which == "all"
        for i, head in enumerate(self.heads):
            wanted = self.open_heads or (i < self.seen_heads if which == "seen" else i == current)
            for parameter in head.parameters():
                free = self.learns(parameter) and parameter not in self._held
                parameter.requires_grad_(wanted and free)
