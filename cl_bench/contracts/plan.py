"""How a task is learned: on what, how long, from which weights, and in which phases."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from cl_bench.contracts.errors import UsageError
from cl_bench.contracts.learner import Learner
from cl_bench.contracts.loss import Loss
from cl_bench.contracts.task import Batch, Data

Start = Literal["current", "initial"] | Mapping[str, Tensor]
"""Weights that a task's training begins from: those that are there, those of before the first task
(pre-trained, where the stream pre-trains), or some by name. Heads of other tasks stay in all cases.
"""


@dataclass(frozen=True)
class Plan:
    """What a task trains on.

    Attributes:
        data: its samples.
        epochs: how many; 0 trains nothing, None leaves it to the task and ``trainer.max_epochs``.
        start: the weights that training begins from.

    Raises:
        UsageError: an option has no such value.
    """

    data: Data
    epochs: int | None = None
    start: Start = "current"

    def __post_init__(self) -> None:
        if self.epochs is not None and (type(self.epochs) is not int or self.epochs < 0):
            raise UsageError(f"Plan.epochs={self.epochs!r}: a whole number of at least 0, or None")
        if not (isinstance(self.start, Mapping) or self.start in ("current", "initial")):
            raise UsageError(
                f"Plan.start={self.start!r}: 'current', 'initial', or weights by parameter name"
            )


@dataclass(frozen=True)
class Phase:
    """A further stage of a task's training, with an optimizer of its own.

    Nothing trains but the parameters of ``groups`` (statistics of normalisation layers beside them
    stay), and only the hooks of the strategy that asked for the phase are called;
    ``learner.progress`` tells which phase it is. Afterwards the task's own parameters train again,
    in the eyes of ``collect`` and ``consolidate``.

    Attributes:
        name: for people and records.
        data: its samples.
        epochs: at least 1.
        groups: gives parameter groups for the optimizer, of which the run decides the kind.
        objective: replaces its owner's, or the learner's loss; None keeps that.
        prepare: called once, at the end of the stage before, and never replayed: what it changes
            must lie in weights or in the strategy's state.
        owner: the strategy that asked for it; filled in where there are companions.
        of_features: batches hold ``features`` (n, d) in place of inputs, and outputs are what the
            seen heads make of them (:meth:`Learner.readout`): nothing below heads is computed.

    Raises:
        UsageError: fewer than 1 epoch.
    """

    name: str
    data: Data
    epochs: int
    groups: Callable[[Learner], Iterable[dict[str, Any]]]
    objective: Callable[[Learner, Batch, Tensor], Loss] | None = None
    prepare: Callable[[Learner], None] | None = None
    owner: object | None = None
    of_features: bool = False

    def __post_init__(self) -> None:
        if type(self.epochs) is not int or self.epochs < 1:
            raise UsageError(f"phase {self.name!r}: epochs={self.epochs!r} must be at least 1")
