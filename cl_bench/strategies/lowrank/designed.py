"""Pairs of thin matrices whose start is designed from weights, inputs or gradients of a task."""

import weakref
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from torch import Tensor

from cl_bench.adapters import Adapted
from cl_bench.adapters.adapted import End
from cl_bench.adapters.designed import Designed, DesignedLayer, Pair
from cl_bench.adapters.targets import chosen
from cl_bench.contracts import Batch, Learner, Loss, Needs, Task, UsageError
from cl_bench.contracts.options import Count, Length, Rate
from cl_bench.contracts.strategy import CLASSIFIED
from cl_bench.strategies.logits import Logits, cross_entropy, open_heads, require_rivals
from cl_bench.subspace import LinearMap


class DesignedPairs(Adapted):
    """A pair a task on frozen weights, W + scale (B - B_0) A, heads beside it.

    Args:
        rank: r of every pair.
        scale: as above.
        targets: kinds of layers (``linear``, ``attention``, ``mlp``, ``conv``; what they are is
            seen in a forward pass) and shell patterns of whole names.
        trains_a: whether A trains too.
        end: as in :class:`Adapted`.

    Attributes:
        prefix: of the options' names in messages.
    """

    needs = Needs(shardable=False, freezes_weights=True, adapts=True)
    prefix = ""

    def __init__(
        self,
        rank: Count,
        scale: Rate,
        targets: Annotated[Sequence[str], Length(1)],
        trains_a: bool = False,
        end: End = "merge",
    ) -> None:
        super().__init__("per_task", end)
        self.rank, self.scale, self.trains_a = rank, scale, trains_a
        self.targets = tuple(targets)
        self.pairs: Mapping[str, Pair] = {}
        self._maps: list[LinearMap] = []
        self._of: weakref.ref[Learner] | None = None

    @abstractmethod
    def design(self, learner: Learner, task: Task) -> Mapping[str, Pair]:
        """How the task's pairs begin, by layer; asked before anything is frozen."""

    def check(self, learner: Learner) -> None:
        """The targets are there, and no narrower than the rank."""
        named = f"strategy.{self.prefix}targets"
        self._maps, self._of = chosen(learner, self.targets, named), weakref.ref(learner)
        for m in self._maps:
            if m.groups != 1:
                raise UsageError(
                    f"{named}: layer {m.name} is a convolution in groups, which has no "
                    "one matrix; leave it out"
                )
            if self.rank > min(m.in_features, m.out_features):
                raise UsageError(
                    f"strategy.{self.prefix}rank={self.rank}: layer {m.name} is a matrix of "
                    f"{m.out_features} x {m.in_features}; use a smaller rank, or leave it out of "
                    f"{named}"
                )

    def check_elsewhere(self, promised: bool = False) -> None:
        """Somebody else's loop attaches what it likes itself."""
        raise UsageError(
            f"{type(self).__name__} puts pairs around layers, in cl_bench's own loop: "
            "python -m cl_bench +strategy=..."
        )

    def maps(self, learner: Learner) -> Sequence[LinearMap]:
        """The layers that get pairs."""
        if self._of is None or self._of() is not learner:
            self.check(learner)
        return self._maps

    def looked(self, learner: Learner, task: Task) -> Mapping[str, Tensor]:
        """Design the pairs."""
        self.pairs = self.design(learner, task)
        return {}

    def make(self, learner: Learner) -> Any:
        """The pairs."""
        return Designed(self.pairs, self.scale, self.trains_a)

    @property
    def layers(self) -> Mapping[str, DesignedLayer]:
        """What stands around each layer; nothing between tasks."""
        return self.attached.layers if self.attached is not None else {}

    def release(self, learner: Learner) -> None:
        """Merge the pairs."""
        super().release(learner)
        self.pairs = {}


class OwnClasses(DesignedPairs):
    """Pairs that are learned by telling a task's classes apart.

    Args:
        rank: as in :class:`DesignedPairs`.
        scale: as in :class:`DesignedPairs`.
        targets: as in :class:`DesignedPairs`.
        logits: classes that compete in the cross-entropy.
        end: as in :class:`Adapted`.
        trains_a: as in :class:`DesignedPairs`.
    """

    needs = Needs(shardable=False, freezes_weights=True, adapts=True, modalities=CLASSIFIED)

    def __init__(
        self,
        rank: Count,
        scale: Rate,
        targets: Annotated[Sequence[str], Length(1)],
        logits: Logits,
        end: End = "merge",
        trains_a: bool = False,
    ) -> None:
        super().__init__(rank, scale, targets, trains_a, end)
        self.logits = logits
        self.classes = range(0)

    def check(self, learner: Learner) -> None:
        """Classes must have something to compete with."""
        super().check(learner)
        require_rivals(learner, self.logits)

    def setup(self, learner: Learner, task: Task) -> None:
        """Heads that take part; the pairs."""
        self.classes = task.classes
        open_heads(learner, self.logits, old=False)
        super().setup(learner, task)

    def objective(self, learner: Learner, batch: Batch, out: Tensor) -> Loss:
        """Cross-entropy among the classes that compete."""
        among = self.classes if self.logits == "current" else None
        return cross_entropy(learner, out, batch, among)
