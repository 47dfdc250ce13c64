"""Whole models folded one after the other: state dicts in, one out."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cl_bench.merging.rule import Fold, Part, Rule

Weights = Mapping[str, Tensor]
"""A model's weights, by name."""


@dataclass(frozen=True)
class Folded:
    """What is left of the models that were folded.

    Attributes:
        count: how many they are.
        measured: the sum of what the rule measured of them.
        folds: the rule's, by name of the weight.
    """

    count: int = 0
    measured: float = 0.0
    folds: Mapping[str, Fold] = field(default_factory=dict)

    @property
    def bytes(self) -> dict[str, int]:
        """The size of each weight's fold."""
        return {
            name: sum(t.numel() * t.element_size() for t in fold.values())
            for name, fold in self.folds.items()
        }


def shaped(delta: Tensor, matrix: bool) -> Tensor:
    """A task vector as rules take it: matrices as (out, rest), in float32 at least."""
    wide = delta if delta.dtype == torch.float64 else delta.float()
    return wide.flatten(1) if matrix else wide


def fold(
    rule: Rule,
    folded: Folded,
    deltas: Weights,
    matrices: Collection[str],
    moments: Weights | None = None,
) -> Folded:
    """``folded`` with one more model in it.

    Args:
        rule: which.
        folded: ``Folded()`` at first.
        deltas: the model's task vectors, the same names every time.
        matrices: names of those that are matrices; convolutions are flattened to (out, rest).
        moments: of the optimizer's squared gradients, for rules that need them.

    Raises:
        ValueError: moments are needed and not given, or the names differ from the models' before.
    """
    if rule.needs_moments and moments is None:
        raise ValueError("the rule weighs models by their optimizers' moments, which are missing")
    if folded.count and folded.folds.keys() != deltas.keys():
        raise ValueError(
            f"other weights than before: {sorted(folded.folds.keys() ^ deltas.keys())}"
        )
    parts = {}
    for name, delta in deltas.items():
        matrix, v = name in matrices, (moments or {}).get(name)
        part = Part(name, matrix, folded.count, 0.0, None if v is None else shaped(v, matrix))
        parts[name] = (part, shaped(delta, matrix))
    measure = rule.measure(parts.values) if rule.measures else 0.0
    folds = {}
    for name, (part, delta) in parts.items():
        before = {k: v.to(delta.device) for k, v in folded.folds.get(name, {}).items()}
        folds[name] = rule.fold(before, delta, replace(part, measure=measure))
    return Folded(folded.count + 1, folded.measured + measure, folds)


def update(rule: Rule, folded: Folded, matrices: Collection[str]) -> dict[str, Tensor]:
    """What the merge adds to theta_0, by name; matrices are (out, rest)."""
    if not folded.count:
        raise ValueError("no model was folded")
    merged = {
        name: rule.merged(one, Part(name, name in matrices, folded.count))
        for name, one in folded.folds.items()
    }
    norm = 0.0
    if rule.normed:
        norm = math.sqrt(sum(float(m.double().square().sum()) for m in merged.values()))
    factor = rule.factor(norm, folded.measured / folded.count)
    return {name: factor * m for name, m in merged.items()}


def applied(
    rule: Rule, folded: Folded, base: Weights, matrices: Collection[str]
) -> dict[str, Tensor]:
    """theta_0 plus what the merge adds to it, in the types and shapes of ``base``."""
    found = {}
    for name, delta in update(rule, folded, matrices).items():
        start = base[name].to(delta.device)
        found[name] = (start.to(delta.dtype) + delta.view_as(start)).to(start.dtype)
    return found


def merge(
    rule: Rule,
    base: Weights,
    models: Sequence[Weights],
    matrices: Collection[str] | None = None,
    moments: Sequence[Weights] | None = None,
) -> dict[str, Tensor]:
    """Fold the models in order, and give the merged weights.

    Args:
        rule: which.
        base: theta_0.
        models: fine-tuned from it, with the same names and shapes.
        matrices: names of the weights that are matrices; by default all of two dimensions.
        moments: of each model.

    Raises:
        ValueError: see :func:`fold`.
    """
    names = {n for n, w in base.items() if w.dim() == 2} if matrices is None else matrices
    folded = Folded()
    for i, model in enumerate(models):
        deltas = {n: _wide(w) - _wide(base[n]) for n, w in model.items()}
        folded = fold(rule, folded, deltas, names, moments[i] if moments else None)
    return applied(rule, folded, base, names)


def _wide(weight: Tensor) -> Tensor:
    return weight if weight.dtype == torch.float64 else weight.float()
