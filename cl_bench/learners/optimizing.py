"""How a learner's optimizers are made, and what one hands on to that of the next task."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from cl_bench.contracts import State
from cl_bench.contracts.learner import Role
from cl_bench.optimizers import (
    AtTask,
    Carried,
    OptimizerFactory,
    give,
    split_by_role,
    taken,
    takes_roles,
)


class Optimizing:
    """Mixin: a fresh optimizer for every task, which may go on from what the last one knew.

    Attributes:
        at_task: what becomes of an optimizer's state when a task begins.
        resumes_inside: whether a checkpoint inside a task holds all that the optimizer knows.
    """

    network: Any
    at_task: AtTask = "reset"
    resumes_inside: bool = True
    _optimizer_factory: OptimizerFactory
    _carried: Carried | None = None
    _due: Carried | None = None

    def roles(self) -> dict[str, Role]:
        """What every parameter is for, by name."""
        raise NotImplementedError

    def make_optimizer(self, groups: Iterable[dict[str, Any]]) -> Optimizer:
        """One on these groups, told the roles of their parameters if it asks for them."""
        if takes_roles(self._optimizer_factory):
            groups = split_by_role(groups, dict(self._named()), self.roles())
        return self._optimizer_factory(groups)

    def _named(self) -> dict[str, nn.Parameter]:
        return dict(self.network.named_parameters())

    def _take_over(self, optimizer: Optimizer) -> None:
        """The first one of a task goes on from the last task's."""
        if self._due is not None:
            give(optimizer, self._named(), self._due, self.at_task)
            self._due = None

    def _hand_on(self, optimizers: Sequence[Optimizer]) -> None:
        """A task's own training is over."""
        if self.at_task != "reset":
            for optimizer in optimizers:
                self._carried = {**(self._carried or {}), **taken(optimizer, self._named())}

    def _carried_state(self) -> State:
        return {} if self.at_task == "reset" else {"optimizer": self._carried}
