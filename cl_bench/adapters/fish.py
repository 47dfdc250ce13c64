"""FISH mask: the weights that matter most to a task train, in place (Sung et al., NeurIPS 2021).

Before training, every weight's empirical Fisher information is estimated, the mean squared
gradient of single samples; the largest entries over all target layers train, all others stay.
``random`` draws the places instead, the control. The count is a LoRA's, r (o + d) summed over
layers, so that both compare. Limit: needs every target's whole gradient once, per sample.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cl_bench.adapters.looking import largest, mean_gradients
from cl_bench.adapters.reparametrised import Reparametrisation, Reparametrised
from cl_bench.contracts import Learner, Task
from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import Count
from cl_bench.subspace import LinearMap


@checked("adapter.config.")
@dataclass
class FISH(Reparametrisation):
    """Single weights that train.

    Args:
        r: as many weights as a LoRA of this rank has.
        mask: where Fisher information is largest, or at ``random``.
    """

    r: Count = 8
    mask: Literal["fisher", "random"] = "fisher"

    def __post_init__(self) -> None:
        self.sampled = self.mask == "fisher"

    def look(
        self, learner: Learner, task: Task, maps: Sequence[LinearMap], samples: int
    ) -> Mapping[str, Tensor]:
        """Places of the largest information."""
        if not self.sampled:
            return {}
        scores = mean_gradients(learner, task, maps, samples, squared=True)
        return largest(scores, sum(self._count(m) for m in maps))

    def _count(self, base: LinearMap) -> int:
        o, d = base.whole().shape
        if self.r * (o + d) > o * d:
            raise ValueError(f"r={self.r}: more than all weights of a layer of {o} x {d}")
        return self.r * (o + d)

    def layer(self, base: LinearMap, seen: Tensor | None) -> Reparametrised:
        """W with some entries changed."""
        if seen is None:
            seen = torch.randperm(base.whole().numel())[: self._count(base)].sort().values
        return _Layer(base, seen.to(base.weight.device))


class _Layer(Reparametrised):
    def __init__(self, base: LinearMap, places: Tensor) -> None:
        super().__init__(base)
        self.register_buffer("seen", places)
        self.values = nn.Parameter(base.whole().new_zeros(len(places)))
        self.seen: Tensor

    def change(self) -> Tensor:
        o, d = self._map.out_features, self._map.in_features
        return self.values.new_zeros(o * d).index_put((self.seen,), self.values).view(o, d)
