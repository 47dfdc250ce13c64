"""The stages of a task: where each begins and ends, what trains in it, whose hooks are called."""

from collections.abc import Iterable

from torch import Tensor, nn

from cl_bench.contracts import Batch, Phase, Strategy, Task
from cl_bench.contracts.plan import Start
from cl_bench.contracts.strategy import overrides
from cl_bench.learners.guardable import is_norm
from cl_bench.learners.objective import Objective
from cl_bench.learners.readout import Readout
from cl_bench.learners.shared import SharedServices
from cl_bench.parallel import sharding


class Stages(Readout, Objective, SharedServices):
    """Mixin: meets tasks, enters the phases that a strategy asks for, and leaves them.

    Attributes:
        phase: that is trained; None in a task's own training.
    """

    phase: Phase | None
    strategy: Strategy
    _before_phase: tuple[list[nn.Parameter], list[nn.Module]] | None

    def begin(self, task: Task, strategy: Strategy, start: Start = "current") -> None:
        """Meet a task: everything that an earlier task or strategy froze is free again."""
        self.task, self.strategy, self.acting = task, strategy, strategy
        self.phase = self._before_phase = None
        self.own_objective = strategy.objective if overrides(strategy, "objective") else None
        self.seen_heads = max(self.seen_heads, task.head + 1)
        self.learned_steps = 0
        self._step.step, self._step.phase = 0, None
        self.stand(None, 0, 0, 0)
        self.held_norms.clear()
        self._held.clear()
        self.equip(strategy)
        self.start_from(start)
        for parameter in self.network.parameters():
            parameter.requires_grad_(self.learns(parameter))
        self.train_heads("seen" if self.scenario == "class" else "current")
        strategy.setup(self, task)  # type: ignore[arg-type]
        self.equip(strategy)
        if self.sharded:
            sharding.agree(self.network)

    def enter(self, phase: Phase, again: bool = False) -> None:
        """From now on only what the phase names trains, and only its owner's hooks are called.

        With ``again`` it goes on where it was, in a run that was resumed.
        """
        if not again:
            self.learned_steps = self._step.step = 0
        self.phase = phase
        if isinstance(phase.owner, Strategy):
            self.acting = phase.owner
        mine = overrides(self.acting, "objective")
        self.own_objective = phase.objective or (self.acting.objective if mine else None)
        groups = phase.groups(self)  # type: ignore[arg-type]
        wanted = {p for group in groups for p in group["params"]}
        norms = [m for m in self._idle_norms(wanted) if m not in self.held_norms]
        self._before_phase = [p for p in self.network.parameters() if p.requires_grad], norms
        for parameter in self.network.parameters():
            parameter.requires_grad_(parameter in wanted)
        self._hold_norms(norms)

    def _idle_norms(self, wanted: set[Tensor]) -> list[nn.Module]:
        """Those of which nothing trains; without parameters, those in a body that does not."""
        body = any(p in wanted for p in self.body.parameters())
        return [
            m
            for m in self.network.modules()
            if is_norm(m)
            and not any(p in wanted for p in m.parameters())
            and not (body and not list(m.parameters()))
        ]

    def outputs(self, batch: Batch) -> Tensor:
        """Of inputs, or of features in a phase that has these."""
        if self.phase is None or not self.phase.of_features:
            return super().outputs(batch)
        return self.readout(self._to_device(batch)["features"])

    def leave(self) -> None:
        """A stage is over: the whole strategy is asked again, and what the task trains trains."""
        if self._before_phase is not None:
            trained, norms = self._before_phase
            self._before_phase = None
            self.network.requires_grad_(False)
            for parameter in trained:
                parameter.requires_grad_(True)
            self._free_norms(norms)
        self.acting, self.phase = self.strategy, None
        mine = overrides(self.strategy, "objective")
        self.own_objective = self.strategy.objective if mine else None

    def _hold_norms(self, norms: Iterable[nn.Module]) -> None:
        """Their running statistics stay as they are."""
        for norm in norms:
            self.held_norms.add(norm)
            norm.eval()

    def _free_norms(self, norms: Iterable[nn.Module]) -> None:
        """Inverse of :meth:`_hold_norms`."""
        for norm in norms:
            self.held_norms.discard(norm)
            norm.train(self.network.training)
