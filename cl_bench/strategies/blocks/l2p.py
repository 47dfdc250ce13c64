"""L2P (Wang et al., CVPR 2022, "Learning to prompt for continual learning").

A pool holds M pairs of a key k_i (d,) and a prompt P_i (L_p, d), for all tasks. A sample with query
q reads the prompts of the N keys that are nearest to q by cosine, before its own positions; the
head reads the mean of what the network makes of the prompts' positions. Learned is

    CE - lambda sum_{i chosen} cos(q, k_i)                                            (Eq. 5)

over prompts, keys and heads. In the widely used PyTorch port (JH-LEE-KR/l2p-pytorch @ f7bc994) all
samples of a batch read the prompts that most of them would choose, at test too: there an answer
depends on the rest of its batch. Here each sample chooses for itself.
"""

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cl_bench.blocks import Prompts, pool_of
from cl_bench.contracts import Learner, UsageError
from cl_bench.contracts.options import Count, Strength
from cl_bench.strategies.blocks.prompting import Prompting, width_of
from cl_bench.strategies.logits import Logits


class PromptPool(nn.Module):
    """M keys (d,) and prompts (L_p, d), drawn from U(-1, 1)."""

    def __init__(self, size: int, length: int, width: int) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.empty(size, width).uniform_(-1, 1))
        self.prompts = nn.Parameter(torch.empty(size, length, width).uniform_(-1, 1))


class L2P(Prompting):
    """A pool of prompts, of which every sample reads those with the nearest keys.

    Args:
        size: M, of the pool.
        length: L_p, positions of a prompt.
        top: N, prompts that a sample reads.
        pull: lambda.
        logits: which classes compete while a task is learned.

    Raises:
        UsageError: more prompts are to be read than there are.
    """

    def __init__(
        self,
        size: Count = 10,
        length: Count = 5,
        top: Count = 5,
        pull: Strength = 0.1,
        logits: Logits = "current",
    ) -> None:
        super().__init__(logits)
        if top > size:
            raise UsageError(f"strategy.top={top}: the pool holds strategy.size={size} prompts")
        self.size, self.length, self.top, self.pull = size, length, top, pull

    def modules(self, learner: Learner) -> Mapping[str, nn.Module]:
        """The pool."""
        return {"pool": PromptPool(self.size, self.length, width_of(learner))}

    def pool(self, learner: Learner) -> nn.Module:
        """Gives the head the prompts' positions."""
        return pool_of(learner, "L2P")

    def give(self, learner: Learner, query: Tensor) -> Prompts:
        """The prompts of the nearest keys, nearest first."""
        pool = cast(PromptPool, learner.extras(self)["pool"])
        cosines = F.normalize(query, dim=1) @ F.normalize(pool.keys, dim=1).to(query).t()
        near, chosen = cosines.topk(self.top, dim=1)
        self._pull = self.pull * near.sum()
        return Prompts(positions=pool.prompts[chosen].flatten(1, 2))
