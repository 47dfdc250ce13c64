"""Continual merging: tasks are fine-tuned apart, and what they changed is merged one after another.

A task's vector is tau_t = theta_t - theta_0, with theta_0 the weights of before the first task. A
rule of :mod:`cl_bench.merging` folds them, and the network becomes theta_0 + what the rule makes of
tau_1 ... tau_t. Where training begins and what answers at test matter as much as the rule
(Dziadzio et al., "How to merge your multimodal models over time?", arXiv:2412.06712), so both are
options. What a task trains are the weights, or a low-rank pair around each matrix.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from cl_bench.contracts import (
    Learner,
    Needs,
    Plan,
    State,
    Statistics,
    Strategy,
    Stream,
    Task,
    UsageError,
    derive_seed,
)
from cl_bench.contracts.options import (
    Count,
    Length,
    OnlyWith,
    PartShare,
    Rate,
    Share,
    SomeShare,
    Strength,
)
from cl_bench.merging import (
    Factors,
    Folded,
    Rule,
    applied,
    fold,
    make_rule,
)
from cl_bench.strategies.merging.low_rank import Cores, MergedPairs, Start
from cl_bench.strategies.merging.told import told
from cl_bench.strategies.merging.weights import matrices_of, own_heads, running_names

Name = Literal[
    "average",
    "task_arithmetic",
    "ties",
    "dare",
    "magmax",
    "tsv_m",
    "iso_c",
    "iso_cts",
    "opcm",
    "dop",
    "ota",
    "core_space",
]
Inner = Literal[
    "average",
    "task_arithmetic",
    "ties",
    "dare",
    "magmax",
    "tsv_m",
    "iso_c",
    "iso_cts",
    "opcm",
    "dop",
]
DROPPED = ("average", "task_arithmetic", "ties", "magmax")
"""Inner rules of DARE."""


def _of(*rules: str) -> OnlyWith:
    return OnlyWith("rule", rules)


def _in(rule: str) -> OnlyWith:
    return OnlyWith("inner", (rule,))


PAIRS = OnlyWith("train", ("pairs",))
OSRM = OnlyWith("pair_start", ("osrm_mean", "osrm_moments"))


class Merge(Strategy):
    """Merges what each task has learned into one network.

    Merged is what trains and belongs to all tasks: matrices by the rule, other weights by what the
    rule does with them, a head that all tasks share among these. Heads that belong to one task each
    stay as that task left them. Names and sizes of what is remembered: theta_0, the fold of the
    rule (``metrics`` tells its bytes by weight), and with ``init: last`` the last model.

    Args:
        rule: how task vectors are merged.
        init: where a task's training begins: at theta_0, at the last task's own model, or at the
            merge so far.
        deploy: what is tested after a task: the merge, or the task's own model.
        scale: what the merged task vector is multiplied by; None is the rule's own.
        alpha: of OPCM, the share of the merge's singular values that is closed to what comes.
        top: of TIES, the share of a model's entries that stay.
        how: of TIES, whether entries that agree are summed or averaged.
        inner: of DARE, the rule that merges what was not dropped; of Core Space, the rule that
            merges the small matrices.
        drop: of DARE, the probability that an entry is dropped.
        rank_cut: of Iso-C, singular values below this share of the largest stay zero.
        common: of Iso-CTS, the share of directions that belong to the sum.
        stability: of DOP, the weight of the merge against the new model.
        power: of OTA, of the squared gradients.
        moments: of OTA, squared gradients as the optimizer has them, or divided by their mean.
        batch_norm: running statistics of the network that holds the merge: the ``average`` over
            the tasks, or those of the ``latest`` task.
        train: of the ``weights``, all; or a fresh low-rank ``pairs`` around each target, all else
            but heads frozen. A task vector is then what the pairs have added to theta_0, those of
            tasks that it began behind included.
        pair_rank, pair_alpha, pair_targets, pair_start, pair_freeze_a, osrm_inputs: of
            :class:`MergedPairs`.

    Raises:
        UsageError: an option is out of range, or Core Space has no pairs to merge.
    """

    def __init__(
        self,
        rule: Name = "opcm",
        init: Literal["initial", "last", "merge"] = "initial",
        deploy: Literal["merge", "latest"] = "merge",
        scale: Rate | None = None,
        alpha: Annotated[Share, _of("opcm"), _in("opcm")] = 0.5,
        top: Annotated[SomeShare, _of("ties"), _in("ties")] = 0.2,
        how: Annotated[Literal["sum", "mean"], _of("ties"), _in("ties")] = "sum",
        inner: Annotated[Inner, _of("dare", "core_space")] = "task_arithmetic",
        drop: Annotated[PartShare, _of("dare"), _in("dare")] = 0.5,
        rank_cut: Annotated[PartShare, _of("iso_c"), _in("iso_c")] = 1e-6,
        common: Annotated[Share, _of("iso_cts"), _in("iso_cts")] = 0.8,
        stability: Annotated[Share, _of("dop"), _in("dop")] = 0.8,
        power: Annotated[Strength, _of("ota")] = 0.5,
        moments: Annotated[Literal["raw", "normalised"], _of("ota")] = "normalised",
        batch_norm: Annotated[
            Literal["average", "latest"], OnlyWith("deploy", ("merge",))
        ] = "average",
        train: Literal["weights", "pairs"] = "weights",
        pair_rank: Annotated[Count, PAIRS] = 8,
        pair_alpha: Annotated[Rate, PAIRS] = 16.0,
        pair_targets: Annotated[Sequence[str], Length(1), PAIRS] = ("linear",),
        pair_start: Annotated[Start, PAIRS] = "random",
        pair_freeze_a: Annotated[bool, PAIRS] = False,
        osrm_inputs: Annotated[Count, OSRM] = 100,
    ) -> None:
        # Weights that are shared out are merged nowhere yet.
        low = train == "pairs"
        self.needs = Needs(shardable=False, own_weights=not low, freezes_weights=low, adapts=low)
        if rule == "core_space" and not low:
            raise UsageError(
                "strategy.rule=core_space: merges the factors of low-rank pairs, and whole weights "
                "have none; add strategy.train=pairs, or choose another rule"
            )
        if rule == "dare" and inner not in DROPPED:
            raise UsageError(
                f"strategy.inner={inner}: with strategy.rule=dare it is one of {', '.join(DROPPED)}"
            )
        self.name, self.init, self.deploy, self.batch_norm = rule, init, deploy, batch_norm
        self.options: dict[str, Any] = {
            "scale": scale,
            "alpha": alpha,
            "top": top,
            "how": how,
            "inner": inner,
            "drop": drop,
            "rank_cut": rank_cut,
            "common": common,
            "stability": stability,
            "power": power,
            "moments": moments,
        }
        self.rule = self._rule(0)
        self.idle = frozenset() if self.rule.needs_moments else frozenset({"after_step"})
        pairs = (pair_rank, pair_alpha, pair_targets, pair_start, pair_freeze_a, osrm_inputs)
        self.pairs = MergedPairs(*pairs) if low else None
        self.cores = Cores() if rule == "core_space" else None
        self.base: dict[str, Tensor] = {}
        self.folded = Folded()
        self.last: dict[str, Tensor] = {}
        self.statistics: dict[str, Tensor] = {}
        self.norms: dict[str, float] = {}
        self.told: dict[str, dict[str, float]] = {}

    def _rule(self, seed: int) -> Rule:
        """The rule; within Core Space the inner one."""
        options = {**self.options, "seed": seed}
        if self.name == "core_space":
            return make_rule(options.pop("inner"), options)
        return make_rule(self.name, options)

    def check(self, learner: Learner) -> None:
        """What pairs are put around is there."""
        if self.pairs:
            self.pairs.check(learner)

    def check_elsewhere(self, promised: bool = False) -> None:
        """Whole weights may be trained by anybody."""
        if self.pairs:
            self.pairs.check_elsewhere(promised)

    def plan(self, stream: Stream, t: int) -> Plan:
        """Training begins where ``init`` says."""
        data = stream[t].train
        if self.init == "initial":
            return Plan(data, start="initial")
        if t == 0 or not self.count or (self.init == "merge") == (self.deploy == "merge"):
            return Plan(data)  # what is deployed is where it begins
        return Plan(data, start=self.last)

    def setup(self, learner: Learner, task: Task) -> None:
        """theta_0, before the first task; what belongs to other tasks alone does not train."""
        learner.train_heads("current")
        self.rule = self._rule(derive_seed(learner.seed, "dare"))
        inside: set[Tensor] = set()
        if self.pairs:
            self.pairs.setup(learner, task)
            inside = {p for layer in self.pairs.layers.values() for p in layer.parameters()}
        if not self.base:
            own = own_heads(learner)
            kept = {n for n, p in learner.named_trainable().items() if p not in inside} - own
            self.base = {name: w.clone() for name, w in learner.weights().items() if name in kept}
            for m in self.pairs.maps(learner) if self.pairs else ():
                self.base[f"{m.name}.weight"] = m.weight.detach().clone()

    def after_step(self, learner: Learner, batch: Mapping[str, Tensor], out: Tensor) -> None:
        """An optimizer without moments is refused at the first step, and not after the task."""
        if learner.progress.step == 1:
            learner.second_moments()

    @torch.no_grad()
    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """Fold the task's vector, and put into the network what is deployed."""
        moments = learner.second_moments() if self.rule.needs_moments else None
        begun: dict[str, Tensor] = {}
        factors: dict[str, Factors] = {}
        if self.pairs:
            begun = {
                f"{m.name}.weight": m.weight.detach().clone() for m in self.pairs.maps(learner)
            }
            factors = self.pairs.take(learner)
        weights, matrices = learner.weights(), matrices_of(learner)
        base = {name: w.to(weights[name].device) for name, w in self.base.items()}
        deltas = {name: weights[name] - start for name, start in base.items()}
        for name, (B, A) in factors.items():  # without the rounding of W + B A
            deltas[name] = begun[name] - base[name] + (B @ A).view_as(base[name])
        try:
            merged = self._merged(base, deltas, factors, matrices, moments)
        except ValueError as error:
            raise UsageError(f"strategy.rule={self.name}: {error}") from error
        running = self._running(weights)
        changes = {name: merged[name] - base[name] for name in merged}
        sizes = (self.folded if self.cores is None else self.cores).bytes
        self.told = told(deltas, changes, matrices, self.norms, self.count, sizes)
        found = {**merged, **running}
        if self.deploy == "merge" and self.init == "last":
            names = (*merged, *running_names(weights))
            self.last = {name: weights[name].clone() for name in names}
        elif self.deploy == "latest" and self.init == "merge":
            self.last = found
        if self.deploy == "merge":
            learner.load_weights({**weights, **found})

    def _merged(
        self,
        base: Mapping[str, Tensor],
        deltas: Mapping[str, Tensor],
        factors: Mapping[str, Factors],
        matrices: frozenset[str],
        moments: Mapping[str, Tensor] | None,
    ) -> dict[str, Tensor]:
        """The merge, with the task that has just been learned in it."""
        if self.cores is None:
            self.folded = fold(self.rule, self.folded, deltas, matrices, moments)
            return applied(self.rule, self.folded, base, matrices)
        beside = {name: delta for name, delta in deltas.items() if name not in factors}
        added = self.cores.fold(factors, beside, self.init, self.rule)
        return {
            name: (base[name].to(delta) + delta.view_as(base[name])).to(base[name])
            for name, delta in added.items()
        }

    @property
    def count(self) -> int:
        """Tasks that are merged."""
        return self.folded.count if self.cores is None else len(self.cores.models)

    def release(self, learner: Learner) -> None:
        """Nothing is left around the layers."""
        if self.pairs:
            self.pairs.release(learner)

    def _running(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Batch normalisation's statistics that go with the merge."""
        if self.batch_norm == "latest":
            return {}
        for name in running_names(weights):
            now = weights[name]
            before = self.statistics.get(name, now).to(now.device)
            self.statistics[name] = before + (now - before) / self.count
        return dict(self.statistics)

    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """Of the newest task's vector and the merge, per matrix, and the bytes of its fold.

        ``merge_aligned`` is the share of the task vector in the merge's leading directions,
        ``merge_contradicted`` the share (of absolute values) where the merge has the other sign,
        ``merge_norm_kept`` the merge's norm over the task vectors' mean norm.
        """
        return self.told

    def state_dict(self) -> State:
        """theta_0, the fold, and what the next task may begin with."""
        return {
            "base": dict(self.base),
            "count": self.folded.count,
            "measured": self.folded.measured,
            "folds": {name: dict(one) for name, one in self.folded.folds.items()},
            "last": dict(self.last),
            "statistics": dict(self.statistics),
            "norms": dict(self.norms),
            "told": {name: dict(values) for name, values in self.told.items()},
            "seen": dict(self.pairs.seen) if self.pairs else {},
            "cores": self.cores.state_dict() if self.cores else {},
        }

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.base, self.last = dict(state["base"]), dict(state["last"])
        folds = {name: dict(one) for name, one in state["folds"].items()}
        self.folded = Folded(state["count"], state["measured"], folds)
        self.statistics, self.norms = dict(state["statistics"]), dict(state["norms"])
        self.told = {name: dict(values) for name, values in state["told"].items()}
        if self.pairs:
            self.pairs.seen = dict(state["seen"])
        if self.cores:
            self.cores.load_state_dict(state["cores"])
