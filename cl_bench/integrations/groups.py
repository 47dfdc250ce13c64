"""An optimizer of somebody else's takes the parameter groups of a strategy, and its rates."""

from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer

from cl_bench.contracts import EpochDecision


def regroup(
    optimizer: Optimizer, groups: Iterable[dict[str, Any]], replaced: set[int]
) -> list[int]:
    """Put groups in place of those that an optimizer has; its state begins anew.

    A parameter that was there keeps the options it had (decay, rate), but for those that its new
    group names; one that is new has those of the first old group.

    Args:
        optimizer: keeps being the one that the loop steps.
        groups: of the strategy.
        replaced: parameters, by id, that go unless a new group has them; others stay.

    Returns:
        For every group, which of the old ones its options are of.
    """
    old = [dict(group) for group in optimizer.param_groups]
    owner = {id(p): i for i, group in enumerate(old) for p in group["params"]}
    first = old[0]
    decayed = first["lr"] / first["initial_lr"] if first.get("initial_lr") else 1.0
    found: list[dict[str, Any]] = []
    origin: list[int] = []
    groups = list(groups)
    kept = {id(p) for group in groups for p in group["params"]}
    for group in groups:
        own = {k: v for k, v in group.items() if k != "params"}
        if "lr" in own:
            own |= {"initial_lr": own["lr"], "lr": own["lr"] * decayed}
        parts: dict[int, list[Any]] = {}
        for parameter in group["params"]:
            parts.setdefault(owner.get(id(parameter), 0), []).append(parameter)
        for i, parameters in parts.items():
            found.append({**old[i], **own, "params": parameters})
            origin.append(i)
    for i, group in enumerate(old):
        others = [p for p in group["params"] if id(p) not in replaced and id(p) not in kept]
        if others:
            found.append({**group, "params": others})
            origin.append(i)
    optimizer.state.clear()
    optimizer.param_groups.clear()
    for group in found:
        optimizer.add_param_group(group)
    return origin


def decide(optimizers: Iterable[Optimizer], decision: EpochDecision) -> None:
    """Scale every rate, from its initial value if the decision resets it."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            start = group.get("initial_lr", group["lr"]) if decision.reset_rate else group["lr"]
            group["lr"] = start * decision.scale_rate
