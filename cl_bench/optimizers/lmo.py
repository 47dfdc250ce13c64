"""Steepest descent in a norm: W <- W - lr * argmax <M, D> over |D| <= 1, M the averaged gradient.

The linear minimisation oracle of each norm (Pethick et al., 2025, "Training Deep Learning Models
with Norm-Constrained LMOs"): Frobenius M / |M|, spectral U V^T, largest entry sign(M), largest row
or column M with its rows or columns normalised.

With ``frobenius`` this is normalised SGD with momentum. AuON, which divides M / |M| by the root
mean square of its hyperbolic cosine, is the same to sinh(1)^2 / (2 m n): no class of its own.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from cl_bench.optimizers.orthogonal import newton_schulz, polar
from cl_bench.optimizers.rule import Rule, averaged

Norm = Literal["frobenius", "spectral", "newton_schulz", "max", "row", "column"]


class LMO(Rule):
    """Steps of one length in a norm, whatever the gradient's.

    Args:
        params: parameters or groups; vectors only where the norm is of any tensor, ``frobenius`` or
            ``max``.
        lr: length of a step in that norm.
        momentum: beta of M <- beta M + (1 - beta) G.
        norm: of a parameter's change; ``newton_schulz`` is ``spectral`` by Muon's five steps,
            in the weights' precision.
        weight_decay: decoupled.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        momentum: float = 0.9,
        norm: Norm = "frobenius",
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr, weight_decay, momentum=momentum, norm=norm)

    def direction(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """The oracle's answer for M."""
        return oracle(averaged(gradient, state, group["momentum"]), group["norm"])


def oracle(M: Tensor, norm: Norm) -> Tensor:
    """D with |D| <= 1 whose product with M is largest."""
    tiny = torch.finfo(M.dtype).tiny
    if norm == "frobenius":
        return M.div(M.norm().clamp_min(tiny))
    if norm == "max":
        return M.sign()
    if norm == "spectral":
        return polar(M)
    if norm == "newton_schulz":
        return newton_schulz(M)
    return M.div(M.norm(dim=int(norm == "row"), keepdim=True).clamp_min(tiny))
