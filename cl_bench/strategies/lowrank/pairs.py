"""Pairs of thin matrices on top of frozen weights, one at a time: the adapters of O-LoRA's family.

A task t learns a pair (A_t, B_t), W_t = W_{t-1} + alpha / r B_t A_t with A_t (r, d) and B_t (o, r),
while everything else is frozen (Hu et al., ICLR 2022, "LoRA").
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from cl_bench.adapters import Adapted
from cl_bench.adapters.adapted import End, Lifetime
from cl_bench.adapters.targets import require_untied
from cl_bench.contracts import (
    CLASSIFIED,
    Learner,
    Memory,
    Needs,
    Protect,
    State,
    Statistics,
    Task,
    UsageError,
)
from cl_bench.contracts.options import Count, PartShare, Rate
from cl_bench.subspace import LinearMap


class LowRankPairs(Adapted):
    """Low-rank pairs on top of frozen weights, merged into them after every task.

    Args:
        rank: r of every pair.
        alpha: a pair adds alpha / r B A.
        dropout: on the inputs of the pair that is trained. The authors' code drops inputs of the
            frozen pairs as well; here those are part of the weight.
        targets: the ends of the names of the layers that get pairs, or ``all`` for every linear
            layer but output layers (convolutions stay as they are, and so do a mixture's router and
            experts, which are no layers of their own); None takes PEFT's default for the kind of
            model (queries and values of T5 and LLaMA, ``c_attn`` of GPT-2).
        full_first: train all weights on the first task, and pairs from the second on: for networks
            that begin with random weights, on which a pair alone learns nothing. Not the method as
            published, which adapts pretrained models.

    Raises:
        UsageError: an option is out of range.
    """

    needs = Needs(modalities=CLASSIFIED | {"text"}, freezes_weights=True, adapts=True)

    lasting: ClassVar[tuple[Lifetime, End]] = ("per_task", "merge")

    def __init__(
        self,
        rank: Count = 8,
        alpha: Rate = 32.0,
        dropout: PartShare = 0.1,
        targets: Sequence[str] | Literal["all"] | None = None,
        full_first: bool = False,
    ) -> None:
        super().__init__(*self.lasting)
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.targets = targets
        self.full_first = full_first
        self.past: dict[str, Tensor] = {}  # A_1, A_2, ... (t r, d) of every layer
        self.layers: dict[str, Any] = {}
        self.overlap: dict[str, float] = {}
        self._pair = ""

    def check(self, learner: Learner) -> None:
        """PEFT must be there, and layers to adapt that no embedding shares its weight with."""
        _require_peft()
        self.maps(learner)

    def maps(self, learner: Learner) -> list[LinearMap]:
        """The layers that get pairs."""
        linear = learner.layers(Protect(bias="free", heads="never"))
        found = {m.name: m for m in linear if m.is_whole_layer and m.weight.dim() == 2}
        ends = self.targets if self.targets is not None else _default_targets(learner)
        maps = [m for n, m in found.items() if ends == "all" or any(_ends(n, end) for end in ends)]
        named = [] if ends == "all" or self.targets is None else ends
        wrong = [end for end in named if not any(_ends(n, end) for n in found)]
        if wrong or not maps:
            raise UsageError(
                f"strategy.targets={list(wrong or ends)} is the end of no layer's name; the "
                f"network's layers are {', '.join(found)}"
            )
        require_untied(learner, maps, "strategy.targets")
        return maps

    def footprint(self, learner: Learner, tasks: int, processes: int) -> Memory | None:
        """A pair that trains, those of old tasks, and one layer's change when it is merged."""
        maps = self.maps(learner)
        pair = sum(4 * self.rank * (m.in_features + m.out_features) for m in maps)
        past = sum(4 * self.rank * m.in_features for m in maps)
        merged = max(m.in_features * m.out_features * m.weight.element_size() for m in maps)
        if self.full_first and tasks == 1:
            return Memory()
        frozen = frozenset(name for name, _ in learner.network.named_parameters())
        kept = past * (tasks - 1)
        return Memory(frozen=frozen, trained=pair, kept=kept, boundary=2 * merged + past)

    def make(self, learner: Learner) -> Any:
        """LoRA."""
        from peft import LoraConfig

        return LoraConfig(r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout)  # type: ignore[arg-type]

    def setup(self, learner: Learner, task: Task) -> None:
        """Freeze all there is; put a pair on every target."""
        self.check(learner)
        if self.full_first and task.index == 0:
            return
        super().setup(learner, task)
        assert self.attached is not None
        self._pair, self.layers = self.called(task), self.attached.layers

    def _weights(self, name: str) -> tuple[Tensor, Tensor]:
        """A (r, d) and B (o, r) of the pair that is trained."""
        layer = self.layers[name]
        return layer.lora_A[self._pair].weight, layer.lora_B[self._pair].weight

    def _products(self) -> list[Tensor]:
        """[A_1; A_2; ...] A_t^T (t r, r) of every layer."""
        found = []
        for name in self.layers:
            A, _ = self._weights(name)
            self.past[name] = self.past[name].to(A)
            found.append(self.past[name] @ A.t())
        return found

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """Remember A_t."""
        self.overlap = {}
        with torch.no_grad():
            products = self._products() if self.past else []
        for name, product in zip(self.layers, products, strict=False):
            A = self._weights(name)[0].detach()
            self.overlap[name] = float(product.norm() / (self.past[name].norm() * A.norm()))
        for name in self.layers:
            A = self._weights(name)[0].detach().clone()
            self.past[name] = torch.cat([self.past[name], A]) if name in self.past else A

    def release(self, learner: Learner) -> None:
        """W <- W + alpha / r B A."""
        super().release(learner)
        self.layers = {}

    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """Rank of what all pairs add; ||A A_t^T|| / (||A|| ||A_t||), A that of all pairs before."""
        found: dict[str, dict[str, float]] = {
            name: {"lora_rank": len(A)} for name, A in self.past.items()
        }
        for name, overlap in self.overlap.items():
            found[name]["lora_overlap"] = overlap
        return found

    def state_dict(self) -> State:
        """A_1, A_2, ... and how far the latest overlaps with those before."""
        return {"past": dict(self.past), "overlap": dict(self.overlap)}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.past, self.overlap = dict(state["past"]), dict(state["overlap"])


def _require_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "low-rank adaptation needs the package 'peft', which is not installed: "
            "pip install 'cl_bench[language]'"
        ) from error


def _default_targets(learner: Learner) -> Sequence[str]:
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    configs: list[Any] = [getattr(m, "config", None) for m in learner.network.modules()]
    kinds = [kind for c in configs if isinstance(kind := getattr(c, "model_type", None), str)]
    if not kinds or kinds[0] not in DEFAULTS:
        raise UsageError(
            f"PEFT knows no default for {f'a {kinds[0]}' if kinds else 'this kind of'} model: "
            "name the layers that get low-rank pairs, for example strategy.targets=[q_proj,v_proj]"
            " or strategy.targets=all"
        )
    targets: Sequence[str] = DEFAULTS[kinds[0]]
    return targets


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")
