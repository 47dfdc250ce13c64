"""KeepLoRA: a pair a task that leaves the weights' principal directions and old features alone.

"KeepLoRA: continual learning with residual gradient adaptation", ICLR 2026
(github.com/MaolinLuo/KeepLoRA @ a17f9c2). M begins as the right singular vectors of a layer's
weight W (o, d) that carry a share of its energy: what the network knew. With G the mean gradient of
a new task,

    G (I - M M^T) = U S V^T,   A = V_r^T frozen,   W + (B - B_0) A / r,   B_0 = U_r S_r,

and B alone trains, so that B A M = 0 throughout. After a task M grows by what the layer has read.

The authors' two programs differ. This follows the one for language models with eyes in which
singular vectors of W are kept, those that inputs meet (the one for CLIP takes those of outputs, and
projects inputs by them), and the one for CLIP in all else. Of features it takes second moments of
all; the program for CLIP first averages features that have the same place in a batch. The paper's
text and its numbers were not checked.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from torch import Tensor

from cl_bench.adapters.designed import Pair
from cl_bench.adapters.looking import mean_gradients, pieces
from cl_bench.contracts import Batch, Learner, State, Statistics, Task
from cl_bench.contracts.options import Count, Length, Rate, Share, SomeShare
from cl_bench.strategies.logits import Logits
from cl_bench.strategies.lowrank.designed import OwnClasses
from cl_bench.strategies.lowrank.inflora import grown
from cl_bench.subspace import Moments


class KeepLoRA(OwnClasses):
    """Pairs that begin as the leading part of a gradient beside what is kept.

    Args:
        rank: r of every pair.
        alpha: alpha / r (B - B_0) A is added.
        targets: as in :class:`DesignedPairs`.
        weights: share of a weight's squared singular values whose directions are kept from the
            start; 0 keeps none.
        features: share of a task's squared inputs that M explains after it.
        samples: of every task, for its gradient and its inputs.
        logits: classes that compete in the cross-entropy, in the gradient's as well.
    """

    def __init__(
        self,
        rank: Count = 16,
        alpha: Rate = 1.0,
        targets: Annotated[Sequence[str], Length(1)] = ("attention",),
        weights: Share = 0.85,
        features: SomeShare = 0.99,
        samples: Count = 1000,
        logits: Logits = "current",
    ) -> None:
        super().__init__(rank, alpha / rank, targets, logits)
        self.weights, self.features, self.samples = weights, features, samples
        self.memory: dict[str, Tensor] = {}
        self.overlap: dict[str, float] = {}

    def design(self, learner: Learner, task: Task) -> Mapping[str, Pair]:
        """The gradient's leading part beside M; M first, where there is none."""
        maps = self.maps(learner)
        if not self.memory and self.weights:
            for m in maps:
                rows = Moments(m.in_features)
                rows.add(m.whole())
                self.memory[m.name] = grown(None, rows, self.weights)

        def loss(out: Tensor, batch: Batch) -> Tensor:
            return self.objective(learner, batch, out).mean

        gradients = mean_gradients(learner, task, maps, self.samples, squared=False, of=loss)
        memory = self.memory
        return {name: beside(G, memory.get(name), self.rank) for name, G in gradients.items()}

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """M grows by what was read."""
        super().consolidate(learner, task, stats)
        maps = self.maps(learner)
        read = learner.tap(maps, pieces(learner, task, self.samples))
        for m in maps:
            A, M = self.layers[m.name].A.detach().double(), self.memory.get(m.name)
            if M is not None:
                self.overlap[m.name] = float((A @ M.to(A)).norm() / A.norm().clamp(min=1e-12))
            self.memory[m.name] = grown(M, read[m.name], self.features)

    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """Rank of M, the share of inputs beside it, and how far A lies in it: ||A M|| / ||A||."""
        found: dict[str, dict[str, float]] = {}
        for name, M in self.memory.items():
            found[name] = {"rank": M.shape[1], "capacity_left": 1 - M.shape[1] / len(M)}
            if name in self.overlap:
                found[name]["lora_overlap"] = self.overlap[name]
        return found

    def state_dict(self) -> State:
        """M of every layer."""
        return {"memory": dict(self.memory), "overlap": dict(self.overlap)}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.memory, self.overlap = dict(state["memory"]), dict(state["overlap"])


def beside(G: Tensor, M: Tensor | None, rank: int) -> Pair:
    """A = V_r^T and B_0 = U_r S_r of G (I - M M^T) = U S V^T, G (o, d) and M (d, k)."""
    M = G.new_zeros(G.shape[1], 0).double() if M is None else M.to(G.device)
    left = G.double() - (G.double() @ M) @ M.t()
    U, S, Vt = torch.linalg.svd(left, full_matrices=False)
    Vt = Vt - (Vt @ M) @ M.t()  # a direction that carries rounding alone may lie in M
    return Pair(Vt[:rank], U[:, :rank] * S[:rank])
