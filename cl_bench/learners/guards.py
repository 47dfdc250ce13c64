"""What a strategy guards of all that trains, in numbers and names: the one place that says it."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cl_bench.contracts import Strategy, UsageError
from cl_bench.learners.network import NetworkServices
from cl_bench.subspace import is_adapted, linear_maps

NAMED = 6
"""Most groups of parameters that one line names; a refusal names half as many."""

HALF = (torch.bfloat16, torch.float16)

HALVING = {"bf16-true": torch.bfloat16, "16-true": torch.float16}
"""Lightning's names of precisions in which weights are such."""


@dataclass(frozen=True)
class Guards:
    """The numbers (single weights) of a network that train, by who looks after them.

    Attributes:
        share: of the numbers that tasks share, how much the strategy guards.
        trained: how many tasks share.
        unprotected: those that nothing guards, ``{group of parameters: numbers}``.
        per_task: those in heads that one task each learns, which need no guard; likewise.
        names: of all parameters that nothing guards.
    """

    share: float
    trained: int
    unprotected: Mapping[str, int]
    per_task: Mapping[str, int]
    names: frozenset[str]

    def facts(self) -> dict[str, Any]:
        """For the record."""
        return {k: v for k, v in vars(self).items() if k != "names"}

    def lines(self) -> list[str]:
        """For people."""
        share = f"{100 * self.share:.4g} %"
        found = [f"guarded: {share} of the {self.trained:,} weights that tasks share"]
        if self.unprotected:
            found.append(f"unprotected, though they train: {_listed(self.unprotected)}")
        if self.per_task:
            found.append(f"learned by one task each, and not guarded: {_listed(self.per_task)}")
        return found


def guards(strategy: Strategy, learner: NetworkServices) -> Guards | None:
    """What ``strategy`` guards of ``learner``; None where it makes no such difference.

    Raises:
        UsageError: it would guard nothing of what trains, or weights too coarse to be guarded.
    """
    names = strategy.guarded(learner)  # type: ignore[arg-type]
    if names is None:
        return None
    who, network = type(strategy.members[0]).__name__, learner.network
    trained = {n: p for n, p in network.named_parameters() if learner.learns(p)}
    own = {n for n in trained if n not in names and learner.is_guarded_head(n, "auto") is False}
    shared = {n: p for n, p in trained.items() if n not in own}
    kept = {n: p for n, p in shared.items() if n in names}
    _refuse_adapters(who, network, trained)
    if shared and not kept:
        what = _listed(grouped(network, shared), NAMED // 2)
        raise UsageError(
            f"{who} would guard nothing: the layers that it selects are frozen, and what trains is "
            f"{what}; let those layers train, or choose others"
        )
    coarse = grouped(network, {n: p for n, p in kept.items() if p.dtype in HALF})
    if coarse:
        raise UsageError(
            f"{who} cannot guard weights in half precision, whose rounding leads every update out "
            f"of its subspace: {_listed(coarse, NAMED // 2)}; keep them in float32 (model.float()) "
            "and compute in half precision, with trainer.precision=bf16-mixed or torch.autocast"
        )
    total = sum(p.numel() for p in shared.values())
    free = {n: p for n, p in shared.items() if n not in kept}
    return Guards(
        share=sum(p.numel() for p in kept.values()) / max(total, 1),
        trained=total,
        unprotected=grouped(network, free),
        per_task=grouped(network, {n: trained[n] for n in own}),
        names=frozenset(free),
    )


def rounded_to(
    masters: bool | str, strategy: Strategy, learner: NetworkServices, precision: str
) -> torch.dtype | None:
    """What passes are to round weights to, which then are masters; None where there are none.

    Args:
        masters: whether there are to be; ``auto`` where the strategy constrains steps, which half
            precision would round away or lead out of their subspace.
        strategy: which may guard weights.
        learner: with weights as they were loaded.
        precision: of the Trainer.

    Raises:
        UsageError: masters are asked for, and no weight is in half precision.
    """
    kinds = {p.dtype for p in learner.network.parameters()} & set(HALF)
    if precision in HALVING:
        kinds = {HALVING[precision]}
    if masters is True and not kinds:
        raise UsageError(
            "trainer.masters=true: has no effect, as weights are in full precision; add "
            "trainer.precision=bf16-true, or leave it out"
        )
    wanted = masters is True
    if masters == "auto" and kinds:
        wanted = strategy.guarded(learner) is not None  # type: ignore[arg-type]
    return kinds.pop() if kinds and wanted else None


def refuse_half_precision(strategy: Strategy, learner: NetworkServices, precision: str) -> None:
    """Raise :class:`UsageError` if the Trainer rounds guarded weights themselves."""
    if precision in HALVING and strategy.guarded(learner) is not None:  # type: ignore[arg-type]
        raise UsageError(
            f"trainer.precision={precision} rounds the weights themselves, which leads every "
            f"update out of the subspace that {type(strategy.members[0]).__name__} keeps it in: "
            f"use trainer.precision={precision.replace('true', 'mixed')}"
        )


def _refuse_adapters(who: str, network: nn.Module, trained: Mapping[str, nn.Parameter]) -> None:
    inside = {
        p
        for adapted in network.modules()
        if is_adapted(adapted)
        for part in adapted.modules()
        if not linear_maps("", part)
        for p in part.parameters(recurse=False)
    }
    found = grouped(network, {n: p for n, p in trained.items() if p in inside})
    if found:
        raise UsageError(
            f"{who} guards linear layers, factors of LoRA among them, and here other parts of "
            f"PEFT's adapters train: {_listed(found, NAMED // 2)}; use plain LoRA, or train the "
            "weights themselves, for example after model.merge_and_unload()"
        )


def grouped(network: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, int]:
    """``{group: numbers}``, largest first.

    A layer of which all is among ``parameters`` is named as a whole, and what is numbered only
    differently is one group: ``blocks.*.attn (Attention), 12 of them``.
    """
    numbers: Counter[str] = Counter()
    alike: dict[str, set[str]] = {}
    for name, parameter in parameters.items():
        layer = name.rpartition(".")[0]
        module = network.get_submodule(layer)
        below = any(True for child in module.children() for _ in child.parameters())
        parts = [f"{layer}.{n}" for n, _ in module.named_parameters(recurse=False)]
        whole = layer and not below and all(part in parameters for part in parts)
        member = layer if whole else name
        group = ".".join("*" if part.isdigit() else part for part in member.split("."))
        group = f"{group} ({type(module).__name__})" if whole else group
        numbers[group] += parameter.numel()
        alike.setdefault(group, set()).add(member)
    return {
        f"{group}, {len(alike[group])} of them" if len(alike[group]) > 1 else group: count
        for group, count in numbers.most_common()
    }


def _listed(groups: Mapping[str, int], most: int = NAMED) -> str:
    shown = [f"{name}: {count:,}" for name, count in list(groups.items())[:most]]
    rest = list(groups.values())[most:]
    more = [f"{len(rest)} more groups: {sum(rest):,}"] if rest else []
    return "; ".join([*shown, *more])
