"""What of a guard outlives a process."""

import torch

from cl_bench.contracts import State, Strategy, UsageError
from cl_bench.integrations.borrowed import Borrowed
from cl_bench.integrations.sample import SampledTask
from cl_bench.integrations.session import Session


class Saved:
    """Mixin: the strategy's memory, and which tasks were met."""

    strategy: Strategy
    learner: Borrowed
    met: list[SampledTask]
    _session: Session | None

    @property
    def tasks(self) -> int:
        """How many were met."""
        raise NotImplementedError

    def state_dict(self) -> State:
        """The strategy's memory, its modules and the tasks; the model's weights are not in it."""
        extras = self.learner._extras
        return {
            "tasks": self.tasks,
            "strategy": self.strategy.state_dict(),
            "known": [[t.name, t.classes.start, t.classes.stop, t.head] for t in self.met],
            "extras": {i: dict(modules.state_dict()) for i, modules in extras.items()},
        }

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`, between tasks.

        Raises:
            UsageError: a task is open.
        """
        if self._session is not None:
            raise UsageError("load the state before the `with` block of a task")
        self.strategy.load_state_dict(state["strategy"])
        learner, nothing = self.learner, torch.zeros(1)
        self.met = []
        for t, (name, start, stop, head) in enumerate(state["known"]):
            task = SampledTask(nothing, t, range(start, stop), head, name).bare()
            learner.seen_heads = max(learner.seen_heads, head + 1)
            learner.seen_classes = max(learner.seen_classes, stop)
            learner.belongs(task)
            self.met.append(task)
        learner.equip(self.strategy)
        for i, weights in state["extras"].items():
            learner._extras[i].load_state_dict(weights)
        learner.end()
