"""What merging needs where a task trains a low-rank pair: how pairs begin, and their factors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from torch import Tensor

from cl_bench.adapters.designed import Pair, random_rows
from cl_bench.adapters.looking import pieces
from cl_bench.contracts import Learner, State, Task, derive_seed
from cl_bench.contracts.options import Count, Length, Rate
from cl_bench.merging import Factors, Rule, Weights, core_factors, osrm_rows
from cl_bench.strategies.lowrank.designed import DesignedPairs

Start = Literal["random", "osrm_mean", "osrm_moments"]


class _Read:
    """What a layer reads: its inputs' sum (d,), or C (d, d) of them, all in double precision."""

    def __init__(self, dim: int, moments: bool) -> None:
        self.samples, self.rows, self.moments = 0, 0, moments
        self.sum = torch.zeros((dim, dim) if moments else dim, dtype=torch.float64)

    def add(self, x: Tensor, samples: int = 0) -> None:
        """Take in the rows of ``x`` (n, d)."""
        x = x.detach().double()
        self.sum = self.sum.to(x.device) + (x.t() @ x if self.moments else x.sum(0))
        self.rows += len(x)
        self.samples += samples

    @property
    def found(self) -> Tensor:
        """C / n, or the outer product of the mean."""
        mean = self.sum / self.rows
        return mean if self.moments else torch.outer(mean, mean)


class MergedPairs(DesignedPairs):
    """Pairs of tasks that are merged; a layer that stores W^T has factors A^T and B^T.

    Args:
        rank: r of every pair.
        alpha: a pair adds alpha / rank B A.
        targets: as in :class:`DesignedPairs`.
        start: of A: ``random`` as LoRA's, or by OSRM, reading what inputs of tasks before have
            least energy in (``osrm_moments``), or what their means have nothing in
            (``osrm_mean``). B begins at zero.
        freeze_a: whether A stays.
        samples: of every task, whose inputs OSRM looks at, at the weights that the task begins
            with.

    Attributes:
        seen: what inputs of tasks before were, summed: (d, d) of every layer.
    """

    prefix = "pair_"

    def __init__(
        self,
        rank: Count,
        alpha: Rate,
        targets: Annotated[Sequence[str], Length(1)],
        start: Start,
        freeze_a: bool,
        samples: Count,
    ) -> None:
        super().__init__(rank, alpha / rank, targets, trains_a=not freeze_a)
        self.start, self.samples = start, samples
        self.seen: dict[str, Tensor] = {}
        self.now: dict[str, Tensor] = {}

    def design(self, learner: Learner, task: Task) -> Mapping[str, Pair]:
        """Away from what tasks before have read."""
        self.now = self._inputs(learner, task) if self.start != "random" else {}
        pairs = {}
        for m in self.maps(learner):
            seed = derive_seed(learner.seed, "pair", m.name, task.index)
            rng = torch.Generator().manual_seed(seed)
            if m.name in self.seen:
                pairs[m.name] = Pair(osrm_rows(self.seen[m.name], self.rank, rng))
            else:
                pairs[m.name] = Pair(random_rows(m, self.rank, rng))
        return pairs

    def _inputs(self, learner: Learner, task: Task) -> dict[str, Tensor]:
        maps, moments = self.maps(learner), self.start == "osrm_moments"
        read = {m.name: _Read(m.in_features, moments) for m in maps}
        learner.tap(maps, pieces(learner, task, self.samples), read)
        return {name: one.found for name, one in read.items()}

    def take(self, learner: Learner) -> dict[str, Factors]:
        """The pairs' factors by name of the weight; the network takes them up."""
        found = {}
        for m in self.maps(learner):
            B, A = (factor.detach().clone() for factor in self.layers[m.name].factors())
            found[f"{m.name}.weight"] = (A.t(), B.t()) if m.transposed else (B, A)
        for name, moments in self.now.items():
            known = self.seen.get(name)
            self.seen[name] = moments if known is None else known.to(moments) + moments
        self.now = {}
        self.release(learner)
        return found


@dataclass
class Cores:
    """All tasks' factors, and what else they have changed: Core Space keeps every one.

    Attributes:
        models: of every task, factors by name of the weight.
        others: of every task, what it has changed beside them.
        merged: factors of the merge.
    """

    models: list[dict[str, Factors]] = field(default_factory=list)
    others: list[dict[str, Tensor]] = field(default_factory=list)
    merged: dict[str, Factors] = field(default_factory=dict)

    def fold(
        self,
        factors: Mapping[str, Factors],
        deltas: Weights,
        begun: Literal["initial", "last", "merge"],
        rule: Rule,
    ) -> dict[str, Tensor]:
        """What the merge adds to theta_0, this task's factors among those merged.

        Args:
            factors: what the task's pairs have added to where it began.
            deltas: what it has changed since theta_0, beside.
            begun: where it began.
            rule: the inner one.
        """
        first = {"initial": {}, "last": self.models[-1] if self.models else {}}.get(
            begun, self.merged
        )
        self.models.append({n: _both(first.get(n), pair) for n, pair in factors.items()})
        self.others.append({n: d.clone() for n, d in deltas.items()})
        merged, others = core_factors(self.models, rule, self.others)
        dtype = next(iter(factors.values()))[0].dtype
        self.merged = {n: (b.to(dtype), a.to(dtype)) for n, (b, a) in merged.items()}
        return {**{n: b @ a for n, (b, a) in merged.items()}, **others}

    @property
    def bytes(self) -> dict[str, int]:
        """The size of what is kept of each weight."""
        kept: dict[str, list[Tensor]] = {}
        for model in self.models:
            for name, pair in model.items():
                kept.setdefault(name, []).extend(pair)
        for other in self.others:
            for name, delta in other.items():
                kept.setdefault(name, []).append(delta)
        return {n: sum(t.numel() * t.element_size() for t in ts) for n, ts in kept.items()}

    def state_dict(self) -> State:
        """All of it."""
        return {
            "models": [{n: list(pair) for n, pair in model.items()} for model in self.models],
            "others": [dict(other) for other in self.others],
            "merged": {n: list(pair) for n, pair in self.merged.items()},
        }

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.models = [{n: (p[0], p[1]) for n, p in model.items()} for model in state["models"]]
        self.others = [dict(other) for other in state["others"]]
        self.merged = {n: (p[0], p[1]) for n, p in state["merged"].items()}


def _both(before: Factors | None, pair: Factors) -> Factors:
    """Factors of the sum of two updates."""
    if before is None:
        return pair
    b, a = (t.to(pair[0]) for t in before)
    return torch.cat([b, pair[0]], dim=1), torch.cat([a, pair[1]], dim=0)
