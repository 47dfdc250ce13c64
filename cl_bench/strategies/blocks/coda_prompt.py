"""CODA-Prompt (Smith et al., CVPR 2023; github.com/GT-RIPL/CODA-Prompt @ 6417d4f).

Every block of some has components (P_m, K_m, A_m), of which each task brings M. With a sample's
query q, all (d,) but P_m (L, d),

    alpha_m = cos(q * A_m, K_m),   p = sum_m alpha_m P_m                              (Eqs. 4 to 6)

and attention reads the first half of p as keys, the second as values. New components begin
orthonormal, and orthogonal to older ones, which are frozen: P, K and A each by themselves. Where
more are asked for than there are dimensions, what is left over begins at random. Learned is

    CE + lambda sum_blocks sum_{B in P, K, A} mean (B B^T - I)^2                      (Eq. 8)

over the new components and the heads. The authors' scripts have lambda = 0.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cl_bench.blocks import Prompts
from cl_bench.contracts import Batch, Learner, UsageError, generator
from cl_bench.contracts.options import Count, Index, Length, Strength
from cl_bench.strategies.blocks.prompting import Prompting, require_depth, width_of
from cl_bench.strategies.logits import Logits

PARTS = ("prompts", "keys", "attention")
LEAST = 1e-3
"""Share of a random direction that must lie outside of the older ones."""


class Components(nn.Module):
    """One task's components: ``prompts`` (blocks, M, L d), ``keys``, ``attention`` (blocks, M, d).

    Args:
        older: of tasks before.
        shape: blocks, M, L and d.
        rng: that directions are drawn with.
    """

    def __init__(
        self,
        older: Sequence[nn.Module],
        shape: tuple[int, int, int, int],
        rng: torch.Generator,
    ) -> None:
        super().__init__()
        blocks, count, length, width = shape
        for name in PARTS:
            size = length * width if name == "prompts" else width
            known = [getattr(one, name).detach().cpu() for one in older]
            made = [further([k[i] for k in known], count, size, rng) for i in range(blocks)]
            setattr(self, name, nn.Parameter(torch.stack(made)))


def further(known: Sequence[Tensor], count: int, size: int, rng: torch.Generator) -> Tensor:
    """Unit vectors (count, size), orthogonal to the rows of ``known`` and to each other."""
    before = torch.cat([torch.empty(0, size, dtype=torch.float64), *(k.double() for k in known)])
    Q = torch.linalg.svd(before, full_matrices=False)
    basis = Q.Vh[LEAST * Q.S.max() < Q.S] if len(before) else before
    found: list[Tensor] = []
    for _ in range(count):
        drawn = F.normalize(torch.randn(size, generator=rng, dtype=torch.float64), dim=0)
        left = drawn
        for _ in range(2):  # once leaves rounding behind
            left = left - basis.t() @ (basis @ left)
        if float(left.norm()) > LEAST:
            drawn = left / left.norm()
            basis = torch.cat([basis, drawn[None]])
        found.append(drawn)
    return torch.stack(found).float()


class CODAPrompt(Prompting):
    """Prefixes that are sums of components, weighed by every sample's query.

    Args:
        components: M, of a task.
        length: L; half of it are keys, half values.
        blocks: that read prompts, from 0.
        orthogonality: lambda.
        logits: which classes compete while a task is learned.

    Raises:
        UsageError: an odd length.
    """

    penalises_weights = False

    def __init__(
        self,
        components: Count = 10,
        length: Count = 8,
        blocks: Annotated[Sequence[Index], Length(1)] = (0, 1, 2, 3, 4),
        orthogonality: Strength = 0.0,
        logits: Logits = "current",
    ) -> None:
        super().__init__(logits)
        if length % 2:
            raise UsageError(f"strategy.length={length}: half are keys, half values; an even one")
        self.components, self.length, self.blocks = components, length, list(blocks)
        self.orthogonality = orthogonality
        self.idle = frozenset() if orthogonality else frozenset({"penalty"})

    def check(self, learner: Learner) -> None:
        """Its blocks must be there."""
        super().check(learner)
        require_depth(learner, "CODAPrompt", "blocks", self.blocks)

    def modules(self, learner: Learner) -> Mapping[str, nn.Module]:
        """Components of every task that has begun."""
        shape = len(self.blocks), self.components, self.length, width_of(learner)
        known = learner.extras(self)
        found: dict[str, nn.Module] = {}
        for t in range(self.begun):
            name, rng = f"task{t}", generator(learner.seed, "components", t)
            found[name] = (
                known[name] if name in known else Components([*found.values()], shape, rng)
            )
        return found

    def older(self, learner: Learner) -> list[nn.Module]:
        """Components of earlier tasks."""
        known = learner.extras(self)
        return [known[f"task{t}"] for t in range(self.begun) if f"task{t}" in known]

    def _all(self, learner: Learner) -> dict[str, Tensor]:
        """Everybody's, by what they are: (blocks, tasks M, ...), older ones as they are."""
        known = [learner.extras(self)[f"task{t}"] for t in range(self.begun)]
        return {name: torch.cat([getattr(one, name) for one in known], dim=1) for name in PARTS}

    def give(self, learner: Learner, query: Tensor) -> Prompts:
        """Weighed sums of all components."""
        found, half = self._all(learner), self.length // 2
        prefixes = {}
        for i, block in enumerate(self.blocks):
            P, K, A = (found[name][i].to(query) for name in PARTS)
            alpha = F.cosine_similarity(query[:, None] * A, K[None], dim=2)  # (n, tasks M)
            prompt = (alpha @ P).view(len(query), self.length, -1)
            prefixes[block] = prompt[:, :half], prompt[:, half:]
        return Prompts(prefixes)

    def penalty(self, learner: Learner, batch: Batch, out: Tensor) -> Tensor:
        """Lambda times the squared distance of Gram matrices from the identity."""
        grams = [B @ B.mT - torch.eye(B.shape[1]).to(B) for B in self._all(learner).values()]
        return self.orthogonality * torch.stack([(g**2).mean((1, 2)).sum() for g in grams]).sum()
