"""One task of a strategy inside somebody else's loop, from setup to release."""

from typing import Any

import torch
from torch.optim import Optimizer

from cl_bench.contracts import Strategy, UsageError
from cl_bench.contracts.strategy import overrides
from cl_bench.integrations.borrowed import Borrowed
from cl_bench.integrations.sample import SampledTask

UNSERVED = {
    "plan": "chooses the training data",
    "modules": "brings modules of its own",
    "objective": "replaces the loss",
    "phases": "trains in phases",
    "predict": "answers at test",
    "on_batch": "changes the batches",
    "penalty": "adds to the loss",
    "param_groups": "brings its own parameter groups",
    "after_epoch": "acts at the end of epochs",
    "inference": "acts during evaluation",
}
"""Hooks that only the owner of the loop can call, and what a strategy does there."""


def require_served(strategy: Strategy) -> None:
    """Raise :class:`UsageError` if the strategy needs what somebody else's loop cannot give."""
    if not isinstance(strategy, Strategy):
        raise UsageError(f"strategy={strategy!r}: give an object, such as GPM(threshold=0.95)")
    name = type(strategy).__name__
    wanted = [what for hook, what in UNSERVED.items() if overrides(strategy, hook)]
    if "local" not in strategy.needs.engines:
        wanted.append("runs in a federation")
    if strategy.needs.sample_index or strategy.needs.plain_view:
        wanted.append("asks for more of a batch than the owner of the loop knows of")
    if strategy.needs.task_id_at_test:
        wanted.append("needs the task id at test time")
    if wanted:
        raise UsageError(
            f"{name} {' and '.join(wanted)}, which somebody else's training loop leaves no room "
            "for: run it in cl_bench's own loop (python -m cl_bench +strategy=...), or use a "
            "strategy that works on gradients and steps alone"
        )
    for member in strategy.members:
        member.check_elsewhere()


class Session:
    """Sets the strategy up, calls it around optimizer steps, and takes it off again.

    Args:
        strategy: which updates are allowed.
        learner: the network.
        task: what is known of the task.
        constrain: whether gradients are ready when ``optimizer.step`` is called, or once its
            closure has returned; if not, the owner calls :meth:`constrain`.

    Attributes:
        steps: optimizer steps seen.
    """

    def __init__(
        self, strategy: Strategy, learner: Borrowed, task: SampledTask, constrain: bool
    ) -> None:
        self.strategy = strategy
        self.learner = learner
        self.task = task
        self.steps = 0
        self._constrain_before = constrain
        self._attached: dict[Optimizer, list[Any]] = {}
        self._stepping = False
        self._evaluations = 0

    def begin(self) -> None:
        """Set the strategy up; if that fails, nothing stays changed."""
        self.learner.begin()
        try:
            self.learner.announce(self.strategy)
            self.strategy.setup(self.learner, self.task)
        except BaseException:
            self.end()
            raise
        self.learner.clear_frozen()

    def attach(self, optimizer: Optimizer) -> None:
        """Watch the steps of ``optimizer``; once is enough."""
        if optimizer not in self._attached:
            self.learner.optimizers.append(optimizer)
            self._attached[optimizer] = [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ]

    def attached(self, optimizer: Optimizer) -> bool:
        """Whether the steps of ``optimizer`` are watched."""
        return optimizer in self._attached

    def constrain(self) -> None:
        """Gradients are ready and nothing has moved yet.

        Raises:
            UsageError: the optimizer moves the weights several times within one step.
        """
        if self._stepping:
            self._evaluations += 1
            if self._evaluations > 1:
                raise UsageError(
                    "the optimizer evaluates its closure several times a step, so that the step "
                    "has no one gradient to constrain: use SGD, Adam or another that does it once"
                )
        self.strategy.constrain(self.learner)

    def consolidate(self) -> None:
        """The task is learned: take it into the strategy's memory."""
        stats = self.strategy.collect(self.learner, self.task)
        self.strategy.consolidate(self.learner, self.task, stats)

    def end(self) -> None:
        """Leave the network and its optimizers as they were found, but for what was learned."""
        for handles in self._attached.values():
            for handle in handles:
                handle.remove()
        self._attached.clear()
        try:
            self.strategy.release(self.learner)
        finally:
            self.learner.end()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        self._stepping, self._evaluations = True, 0
        if not self._constrain_before:
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self.constrain()
            return None

        def constrained() -> Any:
            loss = closure()
            self.constrain()
            return loss

        if len(args) > 1:
            return (args[0], constrained, *args[2:]), kwargs
        return args, {**kwargs, "closure": constrained}

    def _after_step(self, *_: Any) -> None:
        self._stepping = False
        self.steps += 1
        # The batch and the outputs stay with the owner of the loop.
        self.strategy.after_step(self.learner, {}, torch.empty(0))


def require_one_process() -> None:
    """Raise :class:`UsageError` in a process group: each process would find bases of its own."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        world = distributed.get_world_size()
        if world > 1:
            raise UsageError(f"{world} processes: this version guards training in one process")
