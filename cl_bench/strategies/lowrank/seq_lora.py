"""Sequential low-rank adaptation ("SeqLoRA"), the baseline of O-LoRA (Wang et al., 2023).

One pair (A, B) is trained through all tasks, W = W_0 + alpha / r B A, and nothing is protected.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from cl_bench.contracts import Learner, State, Statistics, Task
from cl_bench.contracts.options import Inherited
from cl_bench.strategies.lowrank.pairs import LowRankPairs
from cl_bench.subspace import shared_out


class SeqLoRA(LowRankPairs):
    """One low-rank pair for all tasks.

    Between tasks the pair is merged, as with every strategy of this family; the first weights are
    kept, so that it goes on from where it was.

    Args:
        shared: as in :class:`LowRankPairs`.
    """

    def __init__(self, **shared: Inherited) -> None:
        super().__init__(**shared)
        self.kept: dict[str, dict[str, Tensor]] = {}  # W_0, A and B of every layer

    def pair_name(self, task: Task) -> str:
        """The same for all tasks."""
        return "shared"

    def setup(self, learner: Learner, task: Task) -> None:
        """As in all of the family; then the first weights and the pair as they were."""
        super().setup(learner, task)
        with torch.no_grad():
            for name, layer in self.layers.items():
                base: Tensor = layer.get_base_layer().weight  # type: ignore[assignment]
                kept = self.kept.setdefault(name, {"W": base.detach().clone()})
                for letter, weight in zip("WAB", (base, *self._weights(name)), strict=True):
                    if letter in kept:
                        weight.copy_(shared_out(kept[letter], weight))

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """Remember the pair."""
        for name in self.layers:
            A, B = (weight.detach().clone() for weight in self._weights(name))
            self.kept[name] = {"W": self.kept[name]["W"], "A": A, "B": B}

    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """Rank of what the pair adds."""
        return {name: {"lora_rank": self.rank} for name in self.kept}

    def state_dict(self) -> State:
        """W_0 and the pair."""
        return {"kept": {name: dict(kept) for name, kept in self.kept.items()}}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.kept = {name: dict(kept) for name, kept in state["kept"].items()}
