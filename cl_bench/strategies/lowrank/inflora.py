"""InfLoRA: a pair a task, whose down-projection is chosen and frozen before anything is learned.

Liang & Li, "InfLoRA: interference-free low-rank adaptation for continual learning", CVPR 2024
(github.com/liangyanshuo/InfLoRA @ e08b00e). With C the mean x x^T of what a layer reads of the new
task and M an orthonormal basis of what it read of old ones,

    A = (leading r left singular vectors of (I - M M^T) C)^T / sqrt(3),  W + B A,  B from zero,

so that whatever B becomes, by whatever optimizer, B A M = 0. After a task M grows until it explains
a share eps_t of C, which is taken again at the weights that were learned (DualGPM; its two forms,
of M and of its complement, are one projection).
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from cl_bench.adapters.designed import Pair
from cl_bench.adapters.looking import pieces
from cl_bench.contracts import Learner, State, Statistics, Task
from cl_bench.contracts.options import Count, Length, SomeShare, Strength
from cl_bench.strategies.logits import Logits
from cl_bench.strategies.lowrank.designed import OwnClasses
from cl_bench.subspace import Moments, grow


class InfLoRA(OwnClasses):
    """Pairs that read nothing of what layers read of old tasks.

    Args:
        rank: r of every pair.
        targets: as in :class:`DesignedPairs`.
        threshold: eps_1.
        increment: added to it with every task, up to 1.
        energy: of which M explains a share: ``official``, C's squared singular values, which are
            fourth powers of the inputs'; or ``inputs``, those of the inputs, so that more
            directions are kept.
        samples: of every task, whose inputs make C.
        logits: classes that compete in the cross-entropy.
    """

    def __init__(
        self,
        rank: Count = 10,
        targets: Annotated[Sequence[str], Length(1)] = ("attention",),
        threshold: SomeShare = 0.95,
        increment: Strength = 0.005,
        energy: Literal["official", "inputs"] = "official",
        samples: Count = 1000,
        logits: Logits = "current",
    ) -> None:
        super().__init__(rank, 1.0, targets, logits)
        self.threshold, self.increment = threshold, increment
        self.energy, self.samples = energy, samples
        self.memory: dict[str, Tensor] = {}
        self.overlap: dict[str, float] = {}

    def _inputs(self, learner: Learner, task: Task) -> dict[str, Moments]:
        """Second moments of the inputs; ``official``, those of C's columns in their place."""
        maps = self.maps(learner)
        read = learner.tap(maps, pieces(learner, task, self.samples))
        if self.energy == "inputs":
            return {m.name: read[m.name] for m in maps}
        found = {}
        for m in maps:
            found[m.name] = Moments(m.in_features)
            found[m.name].add(read[m.name].gram / read[m.name].rows)
        return found

    def design(self, learner: Learner, task: Task) -> Mapping[str, Pair]:
        """What the new task's inputs have beside M."""
        pairs = {}
        for name, inputs in self._inputs(learner, task).items():
            _, U = inputs.principal(outside=self.memory.get(name))
            A = U.new_zeros(self.rank, len(U))  # rows are left at zero where nothing is left
            leading = U[:, : self.rank].t()
            A[: len(leading)] = leading / 3**0.5
            pairs[name] = Pair(A)
        return pairs

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """M grows by what was read."""
        super().consolidate(learner, task, stats)
        eps = min(1.0, self.threshold + self.increment * task.index)
        for name, inputs in self._inputs(learner, task).items():
            A, M = self.layers[name].A.detach().double(), self.memory.get(name)
            if M is not None:
                self.overlap[name] = float((A @ M.to(A)).norm() / A.norm().clamp(min=1e-12))
            self.memory[name] = grown(M, inputs, eps)

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


def grown(M: Tensor | None, inputs: Moments, eps: float) -> Tensor:
    """[M, U], as GPM grows a basis; at first less the direction that crosses, but never empty."""
    found, _ = grow(M, inputs, eps, below=M is None)
    if found.shape[1] == 0:
        found = inputs.principal()[1][:, :1]
    return found if M is None else torch.cat([M.to(found), found[:, M.shape[1] :]], dim=1)
