"""How much of what a task wrote into the weights lies outside their large singular directions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from cl_bench.contracts import Protect, State, Task
from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import Range
from cl_bench.experiment.observer import Observer
from cl_bench.experiment.probes.settings import ENABLED, Probe, Scene
from cl_bench.learners import BaseLearner
from cl_bench.metrics.alignment import unprotected_by_chance, unprotected_share


@checked("probe.unprotected.")
@dataclass(frozen=True)
class UnprotectedSettings(Probe):
    """How much of a task's update lies where keeping large singular directions protects nothing.

    Attributes:
        enabled: measure it.
        preserve_ratio: share of a weight's singular directions that count as preserved.
    """

    enabled: bool = False
    preserve_ratio: Annotated[float, Range(above=0, below=1), ENABLED] = 0.5

    def observer(self, scene: Scene) -> Observer:
        """What watches."""
        return UnprotectedUpdate(self)


class UnprotectedUpdate(Observer):
    """Looks at every linear map but heads of one task each, whatever the strategy.

    Quantities, after a task: ``unprotected``, of the task's update under the singular directions of
    the weights that the next task begins with (:func:`cl_bench.metrics.unprotected_share`), and
    ``unprotected_chance``, what a random update of that shape has.

    Args:
        settings: of the measurement.
    """

    def __init__(self, settings: UnprotectedSettings) -> None:
        self.settings = settings
        self.began: dict[str, Tensor] = {}

    def before_task(self, learner: BaseLearner, task: Task) -> None:
        """Remember the weights."""
        self.began = {name: W.cpu().clone() for name, W in _weights(learner).items()}

    def after_task(self, learner: BaseLearner, task: Task) -> Mapping[str, Mapping[str, float]]:
        """Decompose every weight that has moved."""
        ratio = self.settings.preserve_ratio
        found = {}
        for name, after in _weights(learner).items():
            update = after - self.began[name].to(after)
            found[name] = {
                "unprotected": unprotected_share(update, after, ratio),
                "unprotected_chance": unprotected_by_chance(after.shape[0], after.shape[1], ratio),
            }
        self.began = {}
        return found

    def state_dict(self) -> State:
        """Inside a task: the weights that it began with."""
        return {"began": dict(self.began)}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.began = dict(state["began"])


def _weights(learner: BaseLearner) -> dict[str, Tensor]:
    return {layer.name: layer.merged() for layer in learner.layers(Protect(bias="free"))}
