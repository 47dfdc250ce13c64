"""AdaMuon with its sign step (Si et al., 2025): Muon whose entries have rates of their own.

    M <- b1 M + (1 - b1) G,   O = NS(sign(M)),   V <- b2 V + (1 - b2) O * O,
    U = O / (sqrt(V / (1 - b2^t)) + eps),   W <- W - lr * 0.2 sqrt(m n) U / |U|

Without the sign O is Muon's direction, as in the paper's first version.
"""

import math
from typing import Any

import torch
from torch import Tensor

from cl_bench.optimizers.orthogonal import newton_schulz
from cl_bench.optimizers.rule import Rule, averaged


class AdaMuon(Rule):
    """For matrices alone.

    Args:
        params: parameters or groups.
        lr: in Adam's scale: the root mean square of a step is 0.2 lr.
        betas: b1 and b2.
        sign: orthogonalise the signs of M instead of M.
        eps: beside the root of V.
        weight_decay: decoupled.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        sign: bool = True,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr, weight_decay, betas=tuple(betas), sign=sign, eps=eps)

    def direction(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """U, rescaled."""
        first, second = group["betas"]
        M = averaged(gradient, state, first)
        O = newton_schulz(M.sign() if group["sign"] else M)  # noqa: E741
        if "exp_avg_sq" not in state:
            state["exp_avg_sq"], state["step"] = torch.zeros_like(O), 0
        state["step"] += 1
        V = state["exp_avg_sq"].mul_(second).addcmul_(O, O, value=1 - second)
        U: Tensor = O / ((V / (1 - second ** state["step"])).sqrt() + group["eps"])
        length = U.norm().clamp_min(torch.finfo(U.dtype).tiny)
        return U.mul(0.2 * math.sqrt(U.numel()) / length)
