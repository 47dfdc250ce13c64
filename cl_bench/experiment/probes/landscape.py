"""Loss of old and new task on the plane that the early and the late phase of a task span."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch import Tensor

from cl_bench.contracts import State, Stream, Task, UsageError
from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import Count
from cl_bench.experiment.observer import Observer
from cl_bench.experiment.probes.settings import ENABLED, Probe, Scene
from cl_bench.experiment.probes.untouched import untouched
from cl_bench.learners import BaseLearner
from cl_bench.learners.observed import loss_on
from cl_bench.learners.protection import EXTRA
from cl_bench.metrics.plane import at, describe_plane
from cl_bench.subspace import merged_parameters
from cl_bench.tracking import Record

Weights = dict[str, Tensor]


@checked("probe.landscape.")
@dataclass(frozen=True)
class LandscapeSettings(Probe):
    """Losses of old and new task on the plane through three sets of weights of the new task.

    Attributes:
        enabled: measure them.
        samples: training samples of each task.
        along_early: first and last place, and number of places, in the early phase's direction.
        along_late: the same in the late phase's direction.
    """

    writes: ClassVar[bool] = True
    enabled: bool = False
    samples: Annotated[Count, ENABLED] = 200
    along_early: Annotated[Sequence[float], ENABLED] = (-1.0, 2.5, 15)
    along_late: Annotated[Sequence[float], ENABLED] = (-1.0, 2.0, 13)

    def __post_init__(self) -> None:
        for key in ("along_early", "along_late"):
            places = list(getattr(self, key))
            right = len(places) == 3 and places[0] < places[1] and places[2] >= 2
            if not right or places[2] != int(places[2]):
                raise UsageError(
                    f"probe.landscape.{key}={places}: first place, last place, number of places; "
                    "try [-1, 2, 13]"
                )

    def observer(self, scene: Scene) -> Observer:
        """What watches."""
        return LossLandscape(self, scene.early, scene.stream, scene.record, scene.seed)


class LossLandscape(Observer):
    """Losses on a grid of theta(a, b), see :mod:`cl_bench.metrics.plane`, after every later task.

    (0, 0) is where the early phase began, (1, 0) where it ended, (1, 1) the end of the task. A task
    that ends within its early phase has no such plane.

    Args:
        settings: grid and samples.
        early: first and last step of the early phase.
        stream: whose tasks are evaluated: the one before, and the one that is learned.
        record: keeps the grid.
        seed: of the samples.
    """

    def __init__(
        self,
        settings: LandscapeSettings,
        early: Sequence[int],
        stream: Stream,
        record: Record,
        seed: int,
    ) -> None:
        self.settings = settings
        self.stream = stream
        self.record = record
        self.seed = seed
        self.first, self.last = early
        self.steps = frozenset(n for n in early if n > 0)
        self.marks: dict[str, Weights] = {}

    def before_task(self, learner: BaseLearner, task: Task) -> None:
        """Where the early phase begins, if that is here."""
        self.marks = {}
        if self.first == 0 and task.index > 0:
            self.marks["first"] = _on_cpu(learner)

    def after_step(self, learner: BaseLearner, task: Task, step: int, rate: float) -> None:
        """Where the early phase begins or ends."""
        if task.index > 0:
            self.marks["first" if step == self.first else "last"] = _on_cpu(learner)

    def after_task(self, learner: BaseLearner, task: Task) -> Mapping[str, Mapping[str, float]]:
        """Sweep the grid."""
        marks, self.marks = self.marks, {}
        if len(marks) < 2:
            return {}
        began = time.perf_counter()
        origin, first, second = _of_all(marks["first"], marks["last"], _on_cpu(learner))
        samples = {
            known: known.sample(self.settings.samples, self.seed)
            for known in (self.stream[task.index - 1], task)
        }
        a, b = (_places(along) for along in (self.settings.along_early, self.settings.along_late))
        losses = {known.name: np.full((len(b), len(a)), np.nan) for known in samples}
        anchors: dict[str, list[float]] = {known.name: [] for known in samples}
        with untouched(learner):
            for i, j in np.ndindex(len(b), len(a)):
                load(learner, at(origin, first, second, a[j], b[i]))
                for known, batch in samples.items():
                    losses[known.name][i, j] = loss_on(learner, batch, known)
            for weights in (origin, first, second):
                load(learner, weights)
                for known, batch in samples.items():
                    anchors[known.name].append(loss_on(learner, batch, known))
        self.record.probe(
            "landscape",
            task=task.index,
            values=describe_plane(origin, first, second),
            along_early=a,
            along_late=b,
            losses={name: grid.tolist() for name, grid in losses.items()},
            anchors=anchors,
            early=[self.first, self.last],
            seconds=time.perf_counter() - began,
        )
        return {}

    def state_dict(self) -> State:
        """Inside a task: the corners that are known."""
        return {"marks": {name: dict(weights) for name, weights in self.marks.items()}}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.marks = {name: dict(weights) for name, weights in state["marks"].items()}


def load(learner: BaseLearner, weights: Weights) -> None:
    """Write parameters in place; buffers stay, and modules of strategies that have just joined."""
    with torch.no_grad():
        for name, parameter in learner.named_parameters():
            if name in weights or not name.startswith(EXTRA):
                parameter.copy_(weights[name])


def _on_cpu(learner: BaseLearner) -> Weights:
    return {name: weight.cpu().clone() for name, weight in merged_parameters(learner).items()}


def _of_all(*corners: Weights) -> list[Weights]:
    """Without weights that were not there all along: a strategy's modules may come and go."""
    known = set.intersection(*map(set, corners))
    return [{name: weights[name] for name in weights if name in known} for weights in corners]


def _places(along: Sequence[float]) -> list[float]:
    # Rounded, so that 0 and 1 are 0 and 1 wherever the grid meets them.
    return [round(float(x), 12) for x in np.linspace(along[0], along[1], int(along[2]))]
