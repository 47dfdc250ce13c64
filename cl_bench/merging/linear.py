"""Rules that treat every entry by itself: average, task arithmetic, MagMax, DARE."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cl_bench.merging.rule import (
    Deltas,
    Fold,
    Part,
    Rule,
    added,
    mean,
    mean_fold,
    require,
    seed_of,
)


@dataclass(frozen=True)
class Average(Rule):
    """theta_0 + the mean task vector. Folds exactly; one tensor a weight."""

    folds = True

    def fold(self, fold: Fold, delta: Tensor, part: Part) -> Fold:
        """Sum and count."""
        return mean_fold(fold, delta)

    def merged(self, fold: Fold, part: Part) -> Tensor:
        """The mean."""
        return mean(fold)


@dataclass(frozen=True)
class TaskArithmetic(Rule):
    """theta_0 + scale times the sum of the task vectors (Ilharco et al., ICLR 2023).

    Folds exactly; one tensor a weight.
    """

    folds = True
    scale: float = 0.3

    def fold(self, fold: Fold, delta: Tensor, part: Part) -> Fold:
        """The sum."""
        return {"sum": added(fold, delta)}

    def merged(self, fold: Fold, part: Part) -> Tensor:
        """The sum."""
        return fold["sum"]


@dataclass(frozen=True)
class MagMax(Rule):
    """Of every entry the largest task vector's, by magnitude (Marczak et al., ECCV 2024).

    Folds exactly; one tensor a weight. Where two are as large, the later one counts. It is meant
    for models that were fine-tuned one after the other.
    """

    folds = True
    scale: float = 0.5

    def fold(self, fold: Fold, delta: Tensor, part: Part) -> Fold:
        """The largest so far."""
        if not fold:
            return {"largest": delta.clone()}
        before = fold["largest"]
        return {"largest": torch.where(delta.abs() >= before.abs(), delta, before)}

    def merged(self, fold: Fold, part: Part) -> Tensor:
        """The largest."""
        return fold["largest"]


def drop(delta: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """DARE's task vector: entries dropped at random, the rest scaled so that the mean is kept."""
    keep = torch.rand(delta.shape, generator=generator) >= share
    return delta * keep.to(delta.device) / (1 - share)


@dataclass(frozen=True)
class Dare(Rule):
    """Another rule on task vectors of which a random share is dropped (Yu et al., ICML 2024).

    Folds exactly where the inner rule does: what is dropped is a pure function of the seed, the
    weight's name and the model's place.

    Attributes:
        inner: the rule; its scale counts, and ``scale`` multiplies it.
        drop: probability that an entry is dropped; the others are divided by 1 - drop.
        seed: of what is dropped.
    """

    inner: Rule = field(default_factory=TaskArithmetic)
    drop: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        require("drop", self.drop, "[0, 1)", 0 <= self.drop < 1)

    @property
    def folds(self) -> bool:  # type: ignore[override]
        """As the inner rule."""
        return self.inner.folds

    @property
    def measures(self) -> bool:  # type: ignore[override]
        """As the inner rule."""
        return self.inner.measures

    @property
    def normed(self) -> bool:  # type: ignore[override]
        """As the inner rule."""
        return self.inner.normed

    @property
    def needs_moments(self) -> bool:  # type: ignore[override]
        """As the inner rule."""
        return self.inner.needs_moments

    def _dropped(self, delta: Tensor, part: Part) -> Tensor:
        rng = torch.Generator().manual_seed(seed_of(self.seed, part.name, part.index))
        return drop(delta, self.drop, rng)

    def measure(self, deltas: Deltas) -> float:
        """The inner rule's, of what is left."""
        return self.inner.measure(lambda: ((p, self._dropped(d, p)) for p, d in deltas()))

    def fold(self, fold: Fold, delta: Tensor, part: Part) -> Fold:
        """The inner rule's, of what is left."""
        return self.inner.fold(fold, self._dropped(delta, part), part)

    def merged(self, fold: Fold, part: Part) -> Tensor:
        """The inner rule's."""
        return self.inner.merged(fold, part)

    def factor(self, norm: float, measure: float) -> float:
        """The inner rule's, times the scale."""
        return self.scale * self.inner.factor(norm, measure)
