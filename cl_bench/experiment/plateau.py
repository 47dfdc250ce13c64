"""The learning rate within a task: lowered on a plateau of the validation loss, or by step."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from torch.optim.lr_scheduler import CosineAnnealingLR

from cl_bench.contracts import State, Strategy, UsageError
from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import Count, Index, PartShare, Range, Strength
from cl_bench.experiment.snapshot import copied
from cl_bench.learners import BaseLearner, ScheduleFactory


@checked("schedule.")
@dataclass(frozen=True)
class Plateau:
    """The protocol of GPM, TRGP, SGP and ROGO on image streams (their main_cifar100.py).

    Torch's ``ReduceLROnPlateau`` neither ends a task at a least rate nor goes back to the best
    epoch, and holds on to one optimizer, which a strategy may have built anew.

    Attributes:
        factor: what the rate is multiplied by after ``patience`` epochs without a lower loss.
        patience: epochs in a row.
        min_rate: the task ends when the rate would fall below this.
        restore_best: end the task with the weights, and the strategy's state, of the epoch with the
            lowest validation loss.

    Raises:
        UsageError: a value out of range.
    """

    factor: Annotated[float, Range(above=0, below=1)] = 0.5
    patience: Count = 6
    min_rate: Strength = 1e-5
    restore_best: bool = True


class PerStep(ABC):
    """A rate that follows the optimizer steps of each task, as long as that has some."""

    @abstractmethod
    def over(self, steps: int) -> ScheduleFactory:
        """The schedule of a task of that many optimizer steps."""


@checked("schedule.")
@dataclass(frozen=True)
class Cosine(PerStep):
    """The rate falls along half a cosine from the first step of a task to its last.

    Attributes:
        eta_min: what it falls to.

    Raises:
        UsageError: a value out of range.
    """

    eta_min: Strength = 0.0

    def over(self, steps: int) -> ScheduleFactory:
        """The schedule of a task of that many optimizer steps."""
        return partial(CosineAnnealingLR, T_max=steps, eta_min=self.eta_min)


@checked("schedule.")
@dataclass(frozen=True)
class Warmup(PerStep):
    """The rate rises from 0 over a task's first steps, then follows one of transformers' shapes.

    Attributes:
        shape: what becomes of the rate behind the rise, to the task's last step.
        share: of the task's steps in which it rises.
        steps: in which it rises, in the place of ``share``.

    Raises:
        UsageError: a value out of range, or transformers is not installed.
    """

    shape: Literal["constant", "linear", "cosine"] = "linear"
    share: PartShare = 0.03
    steps: Index | None = None

    def __post_init__(self) -> None:
        if find_spec("transformers") is None:
            raise UsageError(
                "schedule=warmup needs the package 'transformers', which is not installed: "
                "pip install 'cl_bench[language]', or use schedule=cosine"
            )

    def over(self, steps: int) -> ScheduleFactory:
        """The schedule of a task of that many optimizer steps."""
        from transformers import get_scheduler

        rising = math.ceil(self.share * steps) if self.steps is None else self.steps
        name = "constant_with_warmup" if self.shape == "constant" else self.shape
        lengths: dict[str, Any] = {"num_warmup_steps": rising, "num_training_steps": steps}
        return lambda optimizer: get_scheduler(name, optimizer, **lengths)


class BestEpoch:
    """Follows the validation loss of one task.

    Args:
        settings: the rule.
        learner: whose weights are kept.
        strategy: whose state is kept.
    """

    def __init__(self, settings: Plateau, learner: BaseLearner, strategy: Strategy) -> None:
        self.settings = settings
        self.learner = learner
        self.strategy = strategy
        self.lowest = math.inf
        self.waited = 0
        self.best: State | None = None

    def after_epoch(self, loss: float) -> bool:
        """Whether patience has run out with this epoch, whose validation loss is ``loss``."""
        if loss < self.lowest:
            self.lowest, self.waited = loss, 0
            if self.settings.restore_best:
                strategy, weights = self.strategy.state_dict(), self.learner.own_weights()
                self.best = copied({"weights": weights, "strategy": strategy})
            return False
        self.waited += 1
        if self.waited < self.settings.patience:
            return False
        self.waited = 0
        return True

    def restore(self) -> None:
        """Back to the best epoch, while what the strategy attached is still attached."""
        if self.best is not None:
            self.learner.load_weights(self.best["weights"])
            self.strategy.load_state_dict(self.best["strategy"])
            self.best = None

    def state_dict(self) -> State:
        """For a checkpoint inside the task."""
        return {"lowest": self.lowest, "waited": self.waited, "best": self.best}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.lowest, self.waited, self.best = state["lowest"], state["waited"], state["best"]
