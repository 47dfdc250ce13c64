"""What a merge rule is: a fold over task vectors, one weight at a time.

A *task vector* is what fine-tuning has added to a weight: tau_t = theta_t - theta_0. A rule takes
the task vectors of one weight in order and says what the merge adds to theta_0. It holds options
and no tensors; what it has seen so far is a :data:`Fold`, which it takes and gives.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

Fold = dict[str, Tensor]
"""What a rule remembers of one weight's task vectors: tensors by name."""


@dataclass(frozen=True)
class Part:
    """Which task vector of which weight is folded.

    Attributes:
        name: of the weight.
        matrix: whether the weight is a matrix (out, in) to the rule, rather than any set of
            numbers. Biases, norms, embeddings and heads are none; convolutions are, flattened.
        index: how many models were folded before this one.
        measure: what :meth:`Rule.measure` found of the whole model.
        moments: of the optimizer's squared gradients, in the weight's shape, for rules that need
            them.
    """

    name: str
    matrix: bool
    index: int = 0
    measure: float = 0.0
    moments: Tensor | None = None


Deltas = Callable[[], Iterable[tuple[Part, Tensor]]]
"""A whole model's task vectors, weight by weight, as often as it is called."""


@dataclass(frozen=True)
class Rule(ABC):
    """Base class of all rules.

    Attributes:
        scale: what the merged task vector is multiplied by.
    """

    folds: ClassVar[bool]
    """Whether a fold has a constant size and comes to what all task vectors at once would.

    Otherwise it keeps every task vector of matrices.
    """
    measures: ClassVar[bool] = False
    """Whether :meth:`measure` looks at the whole model."""
    normed: ClassVar[bool] = False
    """Whether :meth:`factor` depends on the norm of the whole merge."""
    needs_moments: ClassVar[bool] = False
    """Whether it reads :attr:`Part.moments`."""

    scale: float = 1.0

    def measure(self, deltas: Deltas) -> float:
        """One number of a whole model that its parts need."""
        return 0.0

    @abstractmethod
    def fold(self, fold: Fold, delta: Tensor, part: Part) -> Fold:
        """The fold with one more task vector in it; ``fold`` is empty at first, and stays as is.

        Args:
            fold: of the same weight so far.
            delta: (out, in) where ``part.matrix``, otherwise of any shape.
            part: what it is of.
        """

    @abstractmethod
    def merged(self, fold: Fold, part: Part) -> Tensor:
        """What the merge adds to theta_0, but for the factor, in the shape of a task vector."""

    def factor(self, norm: float, measure: float) -> float:
        """What all that :meth:`merged` gives is multiplied by.

        Args:
            norm: of all of it together, where the rule is ``normed``.
            measure: the mean over the models of what :meth:`measure` found.
        """
        return self.scale


def added(fold: Fold, delta: Tensor, name: str = "sum") -> Tensor:
    """The sum that the fold keeps under ``name``, with ``delta`` in it."""
    return fold[name] + delta if fold else delta.clone()


def mean_fold(fold: Fold, delta: Tensor) -> Fold:
    """A fold of which :func:`mean` is the plain mean."""
    one = torch.ones((), dtype=torch.int64, device=delta.device)
    return {"sum": added(fold, delta), "count": added(fold, one, "count")}


def mean(fold: Fold) -> Tensor:
    """The mean of what :func:`mean_fold` was given."""
    return fold["sum"] / fold["count"]


def kept_fold(fold: Fold, delta: Tensor) -> Fold:
    """A fold that keeps every task vector."""
    return {**fold, f"{len(fold):04}": delta.clone()}


def kept(fold: Fold) -> list[Tensor]:
    """What :func:`kept_fold` was given, in that order."""
    return [fold[name] for name in sorted(fold)]


def seed_of(*parts: object) -> int:
    """A seed that depends on all of the parts, the same on every machine."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "big")


def require(option: str, value: float, within: str, met: bool) -> None:
    """Raise ``ValueError`` where an option is out of its range."""
    if not met:
        raise ValueError(f"{option}={value}: must lie in {within}")
