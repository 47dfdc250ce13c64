"""A strategy around a plain PyTorch training loop, which stays as it is."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from cl_bench.contracts import State, Strategy, UsageError
from cl_bench.integrations.borrowed import Borrowed, Forward, Loss
from cl_bench.integrations.sample import Sample, SampledTask
from cl_bench.integrations.session import Session, require_one_process, require_served
from cl_bench.optimizers import place_of


class Guarded:
    """A model whose updates a strategy guards, one task after another.

    Each task's training loop goes inside :meth:`task`. The strategy sees gradients just before
    ``optimizer.step()`` (after clipping, accumulation and unscaling) and weights just after it;
    ``after_step`` gets no batch and no outputs.

    Args:
        model: the network, before ``torch.compile``.
        strategy: which updates are allowed.
        loss: mean loss from outputs and labels, for strategies that take gradients themselves.
        forward: how the model is called on a batch; ``model(batch["x"])`` if None.
        seed: for samples that the strategy draws.

    Attributes:
        tasks: tasks learned so far.

    Raises:
        UsageError: the strategy needs what a plain loop cannot give.
    """

    def __init__(
        self,
        model: nn.Module,
        strategy: Strategy,
        *,
        loss: Loss | None = None,
        forward: Forward | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise UsageError(f"model={model!r}: give a torch.nn.Module that is made already")
        require_served(strategy)
        self.learner = Borrowed(model, loss, forward, seed)
        self.strategy = strategy
        self.tasks = 0
        self._inside = False

    @contextmanager
    def task(self, *optimizers: Optimizer, sample: Sample) -> Iterator[None]:
        """Around the training loop of the next task.

        On leaving, the strategy remembers the task by ``sample``. An exception inside leaves the
        strategy's memory as it was; the weights are what the loop has made of them.

        Args:
            *optimizers: every optimizer that moves the model's weights; fresh or carried over.
            sample: some of the task's training data: ``x``, ``(x, y)`` or tensors by name.

        Raises:
            UsageError: an optimizer, the sample or the strategy does not fit the model; or the
                loop moved weights with an optimizer that was not given, or took no step.
        """
        if self._inside:
            raise UsageError("a task is open already: leave its `with` block first")
        require_one_process()
        task = SampledTask(sample, self.tasks)
        self.learner.accepts(task.batch)
        self._check(optimizers)
        self.learner.projectable = place_of(optimizers, self.learner.parameters())
        session = Session(self.strategy, self.learner, task, constrain=True)
        session.begin()
        self._inside = True
        try:
            with self._only_through(session):
                for optimizer in optimizers:
                    session.attach(optimizer)
                yield
            if session.steps == 0:
                raise UsageError(
                    "no given optimizer took a step inside the task, so nothing was guarded: put "
                    "the loop inside `with`, and give the optimizer that it steps"
                )
            session.consolidate()
            self.tasks += 1
        finally:
            self._inside = False
            session.end()

    def state_dict(self) -> State:
        """The strategy's memory and the number of tasks; the model's weights are not in it."""
        return {"tasks": self.tasks, "strategy": self.strategy.state_dict()}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`, between tasks.

        Raises:
            UsageError: a task is open.
        """
        if self._inside:
            raise UsageError("load the state before the `with` block of a task")
        self.tasks = state["tasks"]
        self.strategy.load_state_dict(state["strategy"])

    def _check(self, optimizers: tuple[Optimizer, ...]) -> None:
        for optimizer in optimizers:
            if not isinstance(optimizer, Optimizer):
                raise UsageError(
                    f"{type(optimizer).__name__} is no torch.optim.Optimizer: give the optimizer "
                    "whose step moves the model's weights"
                )
            if not self._moves(optimizer):
                raise UsageError(
                    f"{type(optimizer).__name__} holds none of the model's parameters: build it on "
                    "model.parameters()"
                )
        if not optimizers:
            raise UsageError("give the optimizer: guard.task(optimizer, sample=(x, y))")

    def _moves(self, optimizer: Optimizer) -> bool:
        own = {id(p) for p in self.learner.parameters()}
        return any(id(p) in own for group in optimizer.param_groups for p in group["params"])

    @contextmanager
    def _only_through(self, session: Session) -> Iterator[None]:
        """Refuse weight changes that the session did not see."""
        steps_before: dict[int, int] = {}

        def enter(optimizer: Optimizer, *_: Any) -> None:
            steps_before[id(optimizer)] = session.steps

        def leave(optimizer: Optimizer, *_: Any) -> None:
            # An optimizer that wraps a given one is seen through that one.
            unseen = session.steps == steps_before.get(id(optimizer))
            if unseen and not session.attached(optimizer) and self._moves(optimizer):
                raise UsageError(
                    f"{type(optimizer).__name__}, which the task was not given, moved the model's "
                    "weights: give every optimizer, guard.task(first, second, sample=...)"
                )

        handles = [
            register_optimizer_step_pre_hook(enter),
            register_optimizer_step_post_hook(leave),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
