"""What a strategy says of the memory that it takes, before anything is loaded."""

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Memory:
    """What one process, the one that holds most, has under a strategy beside a network that trains.

    Attributes:
        frozen: names of parameters that do not train: no gradient, no optimizer state.
        unstepped: names of parameters whose gradients are turned into those of others.
        trained: bytes of parameters of the strategy's own that train.
        kept: bytes that it holds while a task trains, those between tasks among them.
        stepping: bytes that it takes beyond them while the optimizer steps.
        boundary: bytes that it takes beyond them where a task begins or ends.
        saved_between: bytes that it owns in a checkpoint between tasks, of which process 0
            collects those of all.
        saved_inside: the same inside a task.
    """

    frozen: frozenset[str] = frozenset()
    unstepped: frozenset[str] = frozenset()
    trained: int = 0
    kept: int = 0
    stepping: int = 0
    boundary: int = 0
    saved_between: int = 0
    saved_inside: int = 0

    def __add__(self, other: Self) -> Self:
        """Of two strategies that act as one; their boundaries come one after the other."""
        return type(self)(
            self.frozen | other.frozen,
            self.unstepped | other.unstepped,
            self.trained + other.trained,
            self.kept + other.kept,
            self.stepping + other.stepping,
            max(self.boundary, other.boundary),
            self.saved_between + other.saved_between,
            self.saved_inside + other.saved_inside,
        )
