"""Matrices of a network: which are constrained, and how important each is."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from cl_bench.contracts import Learner, Protect, Statistics, UsageError
from cl_bench.subspace import CosineSum, LinearMap


def own_matrices(
    learner: Learner, include: Sequence[str], exclude: Sequence[str]
) -> list[LinearMap]:
    """Layers whose weight is one matrix, and theirs alone: no embedding, no head.

    Args:
        learner: what learns.
        include: patterns of the layers' names; none: all inside the network's blocks.
        exclude: patterns of layers to leave out.

    Raises:
        UsageError: no layer matches, or one shares its weight.
    """
    # Grouped convolutions hold many small matrices in one weight: they belong to the rest.
    linear = learner.layers(Protect(bias="free", heads="never"))
    known = [m for m in linear if m.groups == 1 or m.stacked]
    inside = {id(m) for block in learner.blocks() for m in block.modules()}
    found = [
        layer
        for layer in known
        if not any(fnmatchcase(layer.name.partition("#")[0], p) for p in exclude)
        and (
            any(fnmatchcase(layer.name.partition("#")[0], p) for p in include)
            if include
            else id(layer.module) in inside
        )
    ]
    if not found:
        raise UsageError(
            f"strategy.include={list(include)}, strategy.exclude={list(exclude)} "
            f"leave no layer to constrain; there are {', '.join(m.name for m in known)}"
        )
    every = learner.layers(Protect(bias="free", heads="always"))
    by_place = {(m.module, m.parameter): m.weight for m in every}  # experts of one weight once
    sharing = list(by_place.values()) + [
        p for embedding in learner.embeddings() for p in embedding.parameters()
    ]
    for layer in found:
        if sum(layer.weight is weight for weight in sharing) > 1:
            raise UsageError(
                f"layer {layer.name!r} shares its weight with another: leave it out with "
                f"strategy.exclude, or untie them"
            )
    return found


def means(stats: Statistics) -> dict[str, float]:
    """Importance of each matrix: the mean of cos(x, W x) over the inputs that were summed."""
    found = {}
    for name, cosines in stats.items():
        assert isinstance(cosines, CosineSum)
        found[name] = cosines.mean
    return found
