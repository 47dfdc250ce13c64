"""Clipping by the norm of all gradients, whoever holds which part of them."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from cl_bench.parallel.ranks import world
from cl_bench.parallel.sharding import OWNED, is_part
from cl_bench.subspace import own_rows


@torch.no_grad()
def clip_by_norm(optimizer: Optimizer, most: float, eps: float = 1e-6) -> None:
    """Scale all gradients so that together they are no longer than ``most``.

    Args:
        optimizer: of the gradients. Parts of a parameter, and parameters that one process each
            owns, count wherever they are; what all processes hold alike counts once.
        most: the longest.
        eps: added to the norm, as torch does.
    """
    mine: list[Tensor] = []
    alike: list[Tensor] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                apart = OWNED in group or is_part(parameter.grad)
                (mine if apart else alike).append(own_rows(parameter.grad))
    if world() == 1:
        alike, mine = alike + mine, []
    if not mine and not alike and world() == 1:
        return
    where = next((g.device for g in (*mine, *alike)), optimizer.param_groups[0]["params"][0].device)
    squares = torch.stack([_square(mine, where), _square(alike, where)])
    if world() > 1:
        dist.all_reduce(squares[:1])
    factor = (most / (squares.sum().sqrt() + eps)).clamp_max(1.0)
    for gradient in (*mine, *alike):
        gradient.mul_(factor.to(gradient.dtype))


def _square(gradients: list[Tensor], where: torch.device) -> Tensor:
    norms = [torch.linalg.vector_norm(g, dtype=torch.float64).to(where) for g in gradients]
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=where)
    return torch.stack(norms).square().sum()
