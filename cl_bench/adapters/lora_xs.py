"""LoRA-XS and LoRA-SB: a small square between two frozen factors.

W + alpha / r B R A, where R (r, r) alone trains. LoRA-XS (Balazy et al., 2024): B = U_r S_r and A
= V_r^T of W's own decomposition. LoRA-SB (Ponkshe et al., 2024): B = U_r and A = V_r^T of the
first step that full fine-tuning would take, under Adam the sign of the mean gradient. R starts at
zero here: LoRA-XS draws it with a standard deviation of 1e-5, and LoRA-SB begins behind that first
step, with R = S_r r / alpha, which is a change of the network before it has learned anything.
Limit: r^2 numbers a layer, within a fixed pair of subspaces.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from cl_bench.adapters.looking import mean_gradients
from cl_bench.adapters.reparametrised import Reparametrisation, Reparametrised, top
from cl_bench.contracts import Learner, Task
from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import Count, Rate
from cl_bench.subspace import LinearMap


@checked("adapter.config.")
@dataclass
class LoRAXS(Reparametrisation):
    """A square between frozen factors.

    Args:
        r: rows of the square.
        alpha: alpha / r B R A is added.
        basis: what the factors are singular vectors of: the ``weight`` (LoRA-XS), or the sign of
            the mean ``gradient`` (LoRA-SB).
    """

    r: Count = 8
    alpha: Rate = 8.0
    basis: Literal["weight", "gradient"] = "weight"

    def __post_init__(self) -> None:
        self.sampled = self.basis == "gradient"

    def look(
        self, learner: Learner, task: Task, maps: Sequence[LinearMap], samples: int
    ) -> Mapping[str, Tensor]:
        """Signs of mean gradients, for LoRA-SB."""
        if not self.sampled:
            return {}
        found = mean_gradients(learner, task, maps, samples, squared=False)
        return {name: gradient.sign() for name, gradient in found.items()}

    def layer(self, base: LinearMap, seen: Tensor | None) -> Reparametrised:
        """W + alpha / r B R A."""
        return _Layer(base, self, seen)


class _Layer(Reparametrised):
    def __init__(self, base: LinearMap, config: LoRAXS, seen: Tensor | None) -> None:
        super().__init__(base)
        W = base.whole()
        U, S, Vt = top(W if seen is None else seen, config.r)
        self.register_buffer("B", U * S if config.basis == "weight" else U)
        self.register_buffer("A", Vt)
        self.R = nn.Parameter(W.new_zeros(config.r, config.r))
        self.scale = config.alpha / config.r
        self.A: Tensor
        self.B: Tensor

    def change(self) -> Tensor:
        return self.scale * self.B @ self.R @ self.A
