"""Core Space: low-rank updates merged in the small space that all of them span."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cl_bench.merging.models import Folded, Weights, fold, update
from cl_bench.merging.rule import Rule

Factors = tuple[Tensor, Tensor]
"""B (m, r) and A (r, n) of a low-rank update B A; LoRA's alpha / r belongs into one of them."""


def to_core(factors: Sequence[Factors]) -> tuple[list[Tensor], Tensor, Tensor]:
    """The updates of one weight as small matrices, without loss.

    Args:
        factors: of every model; ranks may differ.

    Returns:
        M_t with B_t A_t = U M_t V^T for every model, U (m, p) and V^T (q, n), both orthonormal,
        where p and q are at most the sum of the ranks. In double precision.
    """
    left = torch.cat([b.double() for b, _ in factors], dim=1)
    right = torch.cat([a.double() for _, a in factors], dim=0)
    u = torch.linalg.svd(left, full_matrices=False)[0]
    vh = torch.linalg.svd(right, full_matrices=False)[2]
    return [(u.t() @ b.double()) @ (a.double() @ vh.t()) for b, a in factors], u, vh


def core_factors(
    models: Sequence[Mapping[str, Factors]], inner: Rule, others: Sequence[Weights] = ()
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """:func:`core_space`'s merge as factors, and what becomes of other weights beside it.

    Args:
        models: as there.
        inner: as there.
        others: task vectors of weights that have no factors and are no matrices, of every model;
            the rule sees them together with the small matrices.

    Returns:
        U M (m, p) and V^T (p, n) by name, in double precision; what is added to the others.

    Raises:
        ValueError: there is no model, or names differ.
    """
    if not models or any(model.keys() != models[0].keys() for model in models):
        raise ValueError("core space needs at least one model, and factors for the same weights")
    spaces = {name: to_core([model[name] for model in models]) for name in models[0]}
    folded = Folded()
    for i in range(len(models)):
        beside = others[i] if others else {}
        cores = {n: s[0][i] for n, s in spaces.items()}
        folded = fold(inner, folded, {**cores, **beside}, spaces.keys())
    merged = update(inner, folded, spaces.keys())
    factors = {name: (u @ merged.pop(name), vh) for name, (_, u, vh) in spaces.items()}
    return factors, merged


def core_space(models: Sequence[Mapping[str, Factors]], inner: Rule) -> dict[str, Tensor]:
    """The merge of low-rank updates by any rule, applied to the small matrices of :func:`to_core`.

    Linear rules come to what they come to on the whole matrices. Rules that look at entries (TIES,
    DARE, MagMax) depend on the basis, so they do not; spectral ones see no null directions.
    The space grows with every model: this needs all factors at once and does not fold.

    Args:
        models: of each, the factors by name of the weight; all have the same names.
        inner: the rule.

    Returns:
        What the merge adds to each weight (m, n), in the factors' type.

    Raises:
        ValueError: there is no model, or names differ.
    """
    factors, _ = core_factors(models, inner)
    return {n: (b @ a).to(models[0][n][0].dtype) for n, (b, a) in factors.items()}
