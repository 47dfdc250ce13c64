"""DualPrompt (Wang et al., ECCV 2022).

Prompts are prefixes: keys and values (L, d) that the attention of some blocks reads beside its own.
G-prompts are learned by all tasks, in the first blocks. Every task t has E-prompts and a key k_t of
its own, in blocks behind them; it begins with what task t-1 has learned. A task is learned with its
own E-prompts, and

    CE - lambda cos(q, k_t)                                                           (Eq. 6)

over prompts, key and heads; at test a sample reads those of the key that is nearest to its query q.

The port that others copied (JH-LEE-KR/dualprompt-pytorch @ 7eb457d) holds chosen E-prompts as
(blocks, 2, n, ...) and *reshapes* that to (blocks, n, 2, ...), so that a sample reads keys and
values of other samples of its batch. ``layout="published"`` does that; ``correct`` permutes.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cl_bench.blocks import Prompts
from cl_bench.contracts import Learner, UsageError
from cl_bench.contracts.options import Count, Index, Strength, shown
from cl_bench.strategies.blocks.prompting import Prompting, require_depth, width_of
from cl_bench.strategies.logits import Logits

Layout = Literal["correct", "published"]


class Prefixes(nn.Module):
    """Keys and values (blocks, 2, L, d) and, maybe, a key (d,), drawn from U(-1, 1)."""

    key: nn.Parameter

    def __init__(self, blocks: int, length: int, width: int, keyed: bool) -> None:
        super().__init__()
        self.prefixes = nn.Parameter(torch.empty(blocks, 2, length, width).uniform_(-1, 1))
        if keyed:
            self.key = nn.Parameter(torch.empty(width).uniform_(-1, 1))


class DualPrompt(Prompting):
    """Prefixes for all tasks, and prefixes of every task, chosen at test by keys.

    Args:
        general: L of the G-prompts.
        expert: L of the E-prompts.
        general_blocks: that read G-prompts, from 0; may be empty.
        expert_blocks: that read E-prompts.
        pull: lambda.
        layout: how chosen prefixes become keys and values.
        logits: which classes compete while a task is learned.

    Raises:
        UsageError: a block is to read both.
    """

    def __init__(
        self,
        general: Count = 5,
        expert: Count = 5,
        general_blocks: Sequence[Index] = (0, 1),
        expert_blocks: Sequence[Index] = (2, 3, 4),
        pull: Strength = 1.0,
        layout: Layout = "correct",
        logits: Logits = "current",
    ) -> None:
        super().__init__(logits)
        self.general, self.expert, self.pull, self.layout = general, expert, pull, layout
        self.general_blocks, self.expert_blocks = list(general_blocks), list(expert_blocks)
        both = set(self.general_blocks) & set(self.expert_blocks)
        if both:
            raise UsageError(
                f"strategy.expert_blocks={shown(self.expert_blocks)}: block {min(both)} is among "
                "strategy.general_blocks too; name it in one of them"
            )

    def check(self, learner: Learner) -> None:
        """Its blocks must be there."""
        super().check(learner)
        require_depth(learner, "DualPrompt", "general_blocks", self.general_blocks)
        require_depth(learner, "DualPrompt", "expert_blocks", self.expert_blocks)

    def modules(self, learner: Learner) -> Mapping[str, nn.Module]:
        """G-prompts, and E-prompts of every task that has begun."""
        width, known = width_of(learner), learner.extras(self)
        found = {"general": Prefixes(len(self.general_blocks), self.general, width, False)}
        for t in range(self.begun):
            new = Prefixes(len(self.expert_blocks), self.expert, width, True)
            if t and f"task{t - 1}" in known and f"task{t}" not in known:
                before = cast(Prefixes, known[f"task{t - 1}"])
                new.to(before.prefixes).prefixes.data.copy_(before.prefixes.data)
            found[f"task{t}"] = new
        return found

    def older(self, learner: Learner) -> list[nn.Module]:
        """E-prompts and keys of earlier tasks."""
        known = learner.extras(self)
        return [known[f"task{t}"] for t in range(self.begun) if f"task{t}" in known]

    def give(self, learner: Learner, query: Tensor) -> Prompts:
        """G-prompts, and E-prompts of the task that is learned, or of the nearest key."""
        known, n = learner.extras(self), len(query)
        experts = [cast(Prefixes, known[f"task{t}"]) for t in range(self.begun)]
        keys = torch.stack([expert.key for expert in experts])
        cosines = F.normalize(query, dim=1) @ F.normalize(keys, dim=1).to(query).t()
        if learner.network.training:
            chosen = torch.full((n,), self.begun - 1, device=query.device)
        else:
            chosen = cosines.argmax(1)
        self._pull = self.pull * cosines.gather(1, chosen[:, None]).sum()
        prefixes = torch.stack([expert.prefixes for expert in experts])[chosen]
        shared = cast(Prefixes, known["general"])
        general = shared.prefixes.expand(n, -1, -1, -1, -1)
        return Prompts(
            {
                **dict(zip(self.general_blocks, by_block(general, "correct"), strict=True)),
                **dict(zip(self.expert_blocks, by_block(prefixes, self.layout), strict=True)),
            }
        )


def by_block(prefixes: Tensor, layout: Layout) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (n, L, d) for every block, of chosen prefixes (n, blocks, 2, L, d)."""
    if layout == "published":
        blocks_first = prefixes.permute(1, 2, 0, 3, 4)  # (blocks, 2, n, L, d)
        n, blocks = prefixes.shape[:2]
        prefixes = blocks_first.reshape(blocks, n, *prefixes.shape[2:]).transpose(0, 1)
    return [(keys, values) for keys, values in prefixes.permute(1, 2, 0, 3, 4)]
