"""Several strategies acting as one: the main one and its companions (``+also=er``)."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cl_bench.contracts import (
    Batch,
    EpochDecision,
    Learner,
    Loss,
    Memory,
    Needs,
    Phase,
    Plan,
    Progress,
    State,
    Statistics,
    Strategy,
    Stream,
    Task,
    UsageError,
)
from cl_bench.contracts.strategy import overrides, penalises_weights

EXCLUSIVE = ("plan", "param_groups", "observe", "objective", "predict")
"""Hooks that give one answer: at most one of the strategies may implement each."""


class Together(Strategy):
    """Calls every member's hooks, the main strategy first.

    Args:
        members: by name; the first one is the main strategy.

    Raises:
        UsageError: two members rewrite gradients, or both implement a hook with one answer; or one
            freezes the weights that another pulls at.
    """

    def __init__(self, members: Mapping[str, Strategy]) -> None:
        self.names = list(members)
        self._members = list(members.values())
        if not self.needs.engines:
            kinds = [f"{n} ({', '.join(sorted(m.needs.engines))})" for n, m in members.items()]
            raise UsageError(f"no engine runs all of {', '.join(kinds)}: run them apart")
        rewriting = [n for n, m in members.items() if m.needs.rewrites_gradients]
        if len(rewriting) > 1:
            raise UsageError(
                f"{' and '.join(rewriting)} both rewrite gradients: their order would decide the "
                "result; run one of them, with companions that replay, penalise or freeze"
            )
        holding = [n for n, m in members.items() if m.needs.freezes_weights]
        pulling = [n for n, m in members.items() if n not in holding and penalises_weights(m)]
        if holding and pulling:
            raise UsageError(
                f"{holding[0]} freezes the network's weights and trains others, which "
                f"{' and '.join(pulling)} would know nothing of: leave one of them out"
            )
        adapting = [n for n, m in members.items() if m.needs.adapts]
        for name in (n for n, m in members.items() if adapting and n != adapting[0]):
            if _on_own_weights(members[name]):
                raise UsageError(
                    f"{name} works on the network's own weights, in whose place {adapting[0]} "
                    "trains others: leave one of them out"
                )
        for hook in EXCLUSIVE:
            both = [n for n, m in members.items() if overrides(m, hook)]
            if len(both) > 1:
                raise UsageError(f"{' and '.join(both)} both decide {hook!r}: run one of them")

    @property
    def members(self) -> Sequence[Strategy]:
        """The main strategy first."""
        return self._members

    @property
    def exemplars(self) -> int:
        """Of all members."""
        return sum(m.exemplars for m in self.members)

    @property
    def passes(self) -> int:
        """Of the member that answers."""
        return self._deciding("predict").passes

    @property
    def adapters(self) -> int:
        """Of all members."""
        return sum(m.adapters for m in self.members)

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        """What all members need together."""
        needs = [m.needs for m in self.members]
        modalities = [n.modalities for n in needs if n.modalities]
        scenarios = [n.scenarios for n in needs if n.scenarios]
        return Needs(
            task_id_at_test=any(n.task_id_at_test for n in needs),
            rewrites_gradients=any(n.rewrites_gradients for n in needs),
            shardable=all(n.shardable for n in needs),
            gathers=any(n.gathers for n in needs),
            first_batch=max(n.first_batch for n in needs),
            plateau=any(n.plateau for n in needs),
            engines=frozenset.intersection(*(n.engines for n in needs)),
            modalities=frozenset.intersection(*modalities) if modalities else frozenset(),
            scenarios=frozenset.intersection(*scenarios) if scenarios else frozenset(),
            freezes_weights=any(n.freezes_weights for n in needs),
            adapts=any(n.adapts for n in needs),
            own_weights=any(n.own_weights for n in needs),
            forgets=all(n.forgets for n in needs),
            sample_index=any(n.sample_index for n in needs),
            plain_view=any(n.plain_view for n in needs),
        )

    def _deciding(self, hook: str) -> Strategy:
        return next((m for m in self.members if overrides(m, hook)), self.members[0])

    def plan(self, stream: Stream, t: int) -> Plan | None:
        """From the member that decides it."""
        return self._deciding("plan").plan(stream, t)

    def check(self, learner: Learner) -> None:
        """Every member, in order."""
        for member in self.members:
            member.check(learner)

    def guarded(self, learner: Learner) -> frozenset[str] | None:
        """What any member guards; None if none of them makes that difference."""
        found = [names for m in self.members if (names := m.guarded(learner)) is not None]
        return frozenset.union(*found) if found else None

    def remarks(self, learner: Learner) -> Sequence[str]:
        """Every member's, in order."""
        return [line for m in self.members for line in m.remarks(learner)]

    def footprint(self, learner: Learner, tasks: int, processes: int) -> Memory | None:
        """Of all members; None if one of them does not say."""
        found = [m.footprint(learner, tasks, processes) for m in self.members]
        told = [m for m in found if m is not None]
        return sum(told[1:], told[0]) if len(told) == len(found) else None

    def setup(self, learner: Learner, task: Task) -> None:
        """Every member, in order."""
        for member in self.members:
            member.setup(learner, task)

    def param_groups(self, learner: Learner) -> Iterable[dict[str, Any]]:
        """From the member that decides it."""
        return self._deciding("param_groups").param_groups(learner)

    def on_batch(self, learner: Learner, batch: Batch) -> Batch:
        """Every member, in order."""
        for member in self.members:
            batch = member.on_batch(learner, batch)
        return batch

    def observe(self, learner: Learner, batch: Batch) -> bool:
        """From the member that decides it."""
        return self._deciding("observe").observe(learner, batch)

    def objective(self, learner: Learner, batch: Batch, out: Tensor) -> Loss:
        """From the member that decides it."""
        return self._deciding("objective").objective(learner, batch, out)

    def penalty(self, learner: Learner, batch: Batch, out: Tensor) -> Tensor | None:
        """Sum of the members' penalties."""
        found = [m.penalty(learner, batch, out) for m in self.members]
        terms = [p for p in found if p is not None]
        return torch.stack(terms).sum() if terms else None

    def constrain(self, learner: Learner) -> None:
        """Every member, in order."""
        for member in self.members:
            member.constrain(learner)

    def after_step(self, learner: Learner, batch: Batch, out: Tensor) -> None:
        """Every member, in order."""
        for member in self.members:
            member.after_step(learner, batch, out)

    def after_epoch(self, learner: Learner, task: Task, progress: Progress) -> EpochDecision | None:
        """What the members decide together: rates are scaled by all, any of them may stop."""
        found = [m.after_epoch(learner, task, progress) for m in self.members]
        decisions = [d for d in found if d is not None]
        if not decisions:
            return None
        return EpochDecision(
            scale_rate=math.prod(d.scale_rate for d in decisions),
            reset_rate=any(d.reset_rate for d in decisions),
            rebuild_optimizer=any(d.rebuild_optimizer for d in decisions),
            stop=any(d.stop for d in decisions),
        )

    def phases(self, learner: Learner, task: Task) -> Sequence[Phase]:
        """Every member's, one member after another; in each only its own hooks are called."""
        return [
            replace(phase, owner=member)
            for member in self.members
            for phase in member.phases(learner, task)
        ]

    def collect(self, learner: Learner, task: Task) -> Statistics:
        """Every member's statistics, under ``member/``."""
        return {
            f"{name}/{key}": value
            for name, member in zip(self.names, self.members, strict=True)
            for key, value in member.collect(learner, task).items()
        }

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """Every member with its own statistics."""
        for name, member in zip(self.names, self.members, strict=True):
            own = {
                k.removeprefix(f"{name}/"): v
                for k, v in stats.items()
                if max((n for n in self.names if k.startswith(f"{n}/")), key=len) == name
            }
            member.consolidate(learner, task, own)

    @contextmanager
    def inference(self, learner: Learner, task: Task | None) -> Iterator[None]:
        """Inside every member's context."""
        with ExitStack() as stack:
            for member in self.members:
                stack.enter_context(member.inference(learner, task))
            yield

    def predict(self, learner: Learner, batch: Batch, task: Task | None) -> Tensor:
        """From the member that decides it."""
        return self._deciding("predict").predict(learner, batch, task)

    def release(self, learner: Learner) -> None:
        """Every member, last one first."""
        for member in reversed(self.members):
            member.release(learner)

    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """Every member's numbers, by layer."""
        merged: dict[str, dict[str, float]] = {}
        for member in self.members:
            for layer, values in member.metrics().items():
                merged.setdefault(layer, {}).update(values)
        return merged

    def state_dict(self) -> State:
        """Every member's state, by name."""
        return {n: m.state_dict() for n, m in zip(self.names, self.members, strict=True)}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        for name, member in zip(self.names, self.members, strict=True):
            member.load_state_dict(state[name])


def _on_own_weights(member: Strategy) -> bool:
    return member.needs.adapts or member.needs.own_weights or overrides(member, "guarded")
