"""Drift of hidden states on fixed samples of old tasks, while a new one is learned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from cl_bench.contracts import State, Stream, Task
from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import Count, Range
from cl_bench.experiment.observer import Observer
from cl_bench.experiment.probes.settings import ENABLED, Probe, Scene
from cl_bench.learners import BaseLearner
from cl_bench.learners.observed import hidden_states
from cl_bench.metrics import drift

States = dict[str, dict[str, Tensor]]
"""Hidden states (n, d) by old task and block."""


@checked("probe.features.")
@dataclass(frozen=True)
class FeatureSettings(Probe):
    """Drift of hidden states on fixed samples of old tasks.

    Attributes:
        enabled: measure it.
        samples: training samples of each old task.
        components: k, principal components that the shift is compared with.
    """

    enabled: bool = False
    samples: Annotated[int, Range(least=2), ENABLED] = 200
    components: Annotated[Count, ENABLED] = 5

    def observer(self, scene: Scene) -> Observer:
        """What watches."""
        return FeatureDrift(self, scene.early, scene.stream, scene.seed)


class FeatureDrift(Observer):
    """Compares hidden states of the same inputs at the ends of windows.

    Quantities, after a task: ``feat/<old task>/<window>/<quantity>`` as in
    :func:`cl_bench.metrics.drift`, by block. Windows: ``task`` (all of it), ``early``, ``late``.

    Args:
        settings: of the measurement.
        early: first and last step of the early window.
        stream: whose tasks are sampled.
        seed: of the samples.
    """

    def __init__(
        self, settings: FeatureSettings, early: Sequence[int], stream: Stream, seed: int
    ) -> None:
        self.settings = settings
        self.stream = stream
        self.seed = seed
        self.first, self.last = early
        self.steps = frozenset(n for n in early if n > 0)
        self.marks: dict[str, States] = {}

    def before_task(self, learner: BaseLearner, task: Task) -> None:
        """Look at the old tasks."""
        self.marks = {"start": self._look(learner, task)}
        if self.first == 0:
            self.marks["first"] = self.marks["start"]

    def after_step(self, learner: BaseLearner, task: Task, step: int, rate: float) -> None:
        """Look again where the early window begins and ends."""
        self.marks["first" if step == self.first else "last"] = self._look(learner, task)

    def after_task(self, learner: BaseLearner, task: Task) -> Mapping[str, Mapping[str, float]]:
        """Compare."""
        end = self._look(learner, task)
        windows = {"task": (self.marks["start"], end)}
        if "first" in self.marks and "last" in self.marks:
            windows["early"] = (self.marks["first"], self.marks["last"])
            windows["late"] = (self.marks["last"], end)
        found: dict[str, dict[str, float]] = {}
        for window, (before, after) in windows.items():
            for old, blocks in before.items():
                for block, states in blocks.items():
                    values = drift(states, after[old][block], self.settings.components)
                    row = found.setdefault(block, {})
                    row |= {f"feat/{old}/{window}/{k}": v for k, v in values.items()}
        self.marks = {}
        return found

    def _look(self, learner: BaseLearner, task: Task) -> States:
        return {
            old.name: hidden_states(learner, old.sample(self.settings.samples, self.seed), old)
            for old in self.stream
            if old.index < task.index
        }

    def state_dict(self) -> State:
        """Inside a task: what was seen of the old ones."""
        return {"marks": {k: {o: dict(b) for o, b in v.items()} for k, v in self.marks.items()}}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.marks = {k: {o: dict(b) for o, b in v.items()} for k, v in state["marks"].items()}
