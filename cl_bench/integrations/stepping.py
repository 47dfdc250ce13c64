"""What a session does around the optimizer steps of somebody else's loop."""

from abc import abstractmethod
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from cl_bench.contracts import Batch, Strategy, UsageError
from cl_bench.contracts.strategy import overrides
from cl_bench.integrations.borrowed import Borrowed
from cl_bench.integrations.watching import constrained
from cl_bench.parallel.ranks import average_, world


class Stepping:
    """Mixin: watches optimizers, constrains gradients, and counts.

    Attributes:
        steps: optimizer steps seen.
        stepping: whether an optimizer is in a step.
    """

    strategy: Strategy
    learner: Borrowed
    batch: Batch
    out: Tensor
    steps: int
    stepping: bool
    trains: bool
    called: set[str]
    needed: set[str]
    _attached: dict[Optimizer, list[Any]]
    _constrain_before: bool
    _checked: bool
    _evaluations: int

    @abstractmethod
    def _missing(self, hooks: list[str]) -> UsageError:
        """What to say of lines that the loop leaves out."""

    def attach(self, optimizer: Optimizer) -> None:
        """Watch the steps of ``optimizer``; once is enough."""
        if optimizer not in self._attached:
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group.get("lr"))
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
        if self.stepping:
            self._evaluations += 1
            if self._evaluations > 1:
                raise UsageError(
                    "the optimizer evaluates its closure several times a step, so that the step "
                    "has no one gradient to constrain: use SGD, Adam or another that does it once"
                )
        if world() > 1:  # what a strategy has added lies outside the wrapped network
            own = {id(p) for p in self.learner.parameters()}
            groups = [group for optimizer in self._attached for group in optimizer.param_groups]
            for parameter in (p for group in groups for p in group["params"]):
                if id(parameter) not in own and parameter.grad is not None:
                    average_(parameter.grad)
        self.learner.acting.constrain(self.learner)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        self.stepping, self._evaluations = True, 0
        if not self.trains and self.learner.phase is None:
            raise UsageError(
                f"{type(self.strategy).__name__} trains nothing: train for lesson.epochs epochs, "
                "`with guard.task(..., epochs=5) as lesson:`"
            )
        if not self._constrain_before:
            return None
        return constrained(self.constrain, args, kwargs)

    def _after_step(self, *_: Any) -> None:
        self.stepping = False
        self.steps += 1
        self.learner._count_step()
        acting = self.learner.acting
        if overrides(acting, "after_step"):
            acting.after_step(self.learner, self.batch, self.out)
        if not self._checked:
            self._checked = True
            if missing := sorted(self.needed - self.called):
                raise self._missing(missing)
