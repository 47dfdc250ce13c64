"""SD-LoRA: directions of old tasks stay, how strong they are goes on being learned.

Wu et al., "SD-LoRA: scalable decoupled low-rank adaptation for class incremental learning", ICLR
2025 (github.com/WuYichen-97/SD-Lora-CL @ 8bacded). In task t a layer is

    W_0 + sum_{i<t} a_i B_i A_i / (||B_i|| ||A_i||) + a_t B_t A_t

with Frobenius norms, where B_i and A_i of old tasks are frozen and all strengths a_i train; each is
one number for all layers, and begins anew with every task. The orthogonality loss of the authors'
code is computed there and never added, and their class for evaluation has the newest direction
alone; both are left out.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from cl_bench.adapters.designed import Pair, random_rows
from cl_bench.adapters.directions import Directions
from cl_bench.contracts import Learner, State, Statistics, Task, derive_seed
from cl_bench.contracts.options import Count, Length, Rate
from cl_bench.strategies.logits import Logits
from cl_bench.strategies.lowrank.designed import OwnClasses


class SDLoRA(OwnClasses):
    """A sum of frozen directions, with strengths that train.

    Args:
        rank: r of every direction.
        targets: as in :class:`DesignedPairs`.
        strength: a_i at the start of every task, of old directions and of the new one; so outputs
            change when a task begins.
        logits: classes that compete in the cross-entropy.

    Attributes:
        directions: B_i and A_i of norm 1, task by task, by layer.
        strengths: a_i as the latest task has left them.
    """

    def __init__(
        self,
        rank: Count = 10,
        targets: Annotated[Sequence[str], Length(1)] = ("attention",),
        strength: Rate = 0.8,
        logits: Logits = "current",
    ) -> None:
        super().__init__(rank, 1.0, targets, logits, end="keep", trains_a=True)
        self.strength = strength
        self.directions: dict[str, list[list[Tensor]]] = {}
        self.strengths: list[float] = []

    def design(self, learner: Learner, task: Task) -> Mapping[str, Pair]:
        """A new direction, as LoRA begins."""
        pairs = {}
        for m in self.maps(learner):
            seed = derive_seed(learner.seed, "direction", m.name, task.index)
            pairs[m.name] = Pair(random_rows(m, self.rank, torch.Generator().manual_seed(seed)))
        return pairs

    def make(self, learner: Learner) -> Any:
        """All directions."""
        layers = self.maps(learner)
        old = {m.name: [(b, a) for b, a in self.directions.get(m.name, [])] for m in layers}
        count = len(old[layers[0].name]) + 1
        like = layers[0].weight
        strengths = nn.Parameter(like.new_full((count,), self.strength))
        return Directions(old, {n: pair.A for n, pair in self.pairs.items()}, strengths)

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """The pair becomes a direction."""
        assert self.attached is not None
        for name, layer in self.attached.layers.items():
            pair = [layer.B.detach().clone(), layer.A.detach().clone()]
            norms = [factor.norm() for factor in pair]
            made = [f / n if n > 0 else f for f, n in zip(pair, norms, strict=True)]
            self.directions.setdefault(name, []).append(made)
            self.strengths = layer.strengths.detach().tolist()

    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """How many directions there are, and how strong the first and the newest one are."""
        if not self.strengths:
            return {}
        told = {"strength_first": self.strengths[0], "strength_newest": self.strengths[-1]}
        ranks = {name: float(self.rank * len(d)) for name, d in self.directions.items()}
        return {name: {"lora_rank": rank, **told} for name, rank in ranks.items()}

    def state_dict(self) -> State:
        """W_0, the directions and how strong they were."""
        return {
            "first": {name: dict(own) for name, own in self.first.items()},
            "directions": {n: [list(pair) for pair in d] for n, d in self.directions.items()},
            "strengths": list(self.strengths),
        }

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.first = {name: dict(own) for name, own in state["first"].items()}
        self.directions = {n: [list(pair) for pair in d] for n, d in state["directions"].items()}
        self.strengths = list(state["strengths"])
