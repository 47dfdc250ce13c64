"""What strategies that mask units have in common: which units, and whose masks are attached."""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from cl_bench.contracts import Learner, Protect, Strategy, Task, UsageError
from cl_bench.subspace import UnitChain


class Masking(Strategy):
    """Multiplies the units of hidden layers, for every task by masks of its own.

    Attributes:
        begun: how many tasks have masks.
        shown: the task whose masks are attached; None where none are.
    """

    def __init__(self) -> None:
        self.begun = 0
        self.shown: int | None = None
        self._handles: list[RemovableHandle] = []

    @abstractmethod
    def mask(self, learner: Learner, index: int, layer: int, training: bool) -> Tensor:
        """A task's mask (units,) of the layer at a position, in training or at test."""

    def chain(self, learner: Learner, heads: Literal["always", "auto"] = "always") -> UnitChain:
        """The hidden layers, and heads that read the last one: all, or those that tasks share."""
        hidden = learner.layers(Protect(heads="never"))
        known = {layer.name for layer in hidden}
        found = learner.layers(Protect(heads=heads))
        return UnitChain(hidden, [layer for layer in found if layer.name not in known])

    def setup(self, learner: Learner, task: Task) -> None:
        """Attach the task's masks.

        Raises:
            UsageError: the network is no chain of layers.
        """
        sample = task.sample(2, learner.seed)

        def run(x: Tensor) -> Tensor:
            return learner.readout(learner.features({**sample, "x": x}), "all")

        try:
            with learner.evaluating():
                self.chain(learner).require(run, sample["x"].to(next(iter(learner.parameters()))))
        except ValueError as error:
            raise UsageError(
                f"{type(self).__name__} masks units of layers that follow one another, and {error}"
                ": use a network without skips in which nothing mixes units between layers, such "
                "as model=mlp"
            ) from None
        self.begun = max(self.begun, task.index + 1)
        self.attach(learner, task.index)

    def attach(self, learner: Learner, index: int | None) -> None:
        """Mask units as that task does; None: not at all."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.shown = [], index
        if index is not None:
            self._handles = self.chain(learner).attach(
                lambda layer, training: self.mask(learner, index, layer, training)
            )

    @contextmanager
    def inference(self, learner: Learner, task: Task | None) -> Iterator[None]:
        """A task that was begun with its masks, others with none."""
        before = self.shown
        self.attach(learner, task.index if task and task.index < self.begun else None)
        try:
            yield
        finally:
            self.attach(learner, before)

    def release(self, learner: Learner) -> None:
        """No masks."""
        self.attach(learner, None)
