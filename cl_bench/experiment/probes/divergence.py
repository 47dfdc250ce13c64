"""How far a task moves what the network says, of its own data and of old tasks'."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from cl_bench.contracts import State, Stream, Task, split_batch
from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import Count
from cl_bench.experiment.observer import Observer
from cl_bench.experiment.probes.settings import ENABLED, Probe, Scene
from cl_bench.learners import BaseLearner
from cl_bench.learners.observed import log_probabilities
from cl_bench.metrics import divergence
from cl_bench.tracking import Record


@checked("probe.divergence.")
@dataclass(frozen=True)
class DivergenceSettings(Probe):
    """KL from what the network said before a task to what it says after it.

    Attributes:
        enabled: measure it.
        samples: training samples of the task, and of each older one.
    """

    enabled: bool = False
    samples: Annotated[Count, ENABLED] = 50

    def observer(self, scene: Scene) -> Observer:
        """What watches."""
        return Divergence(self, scene.stream, scene.seed, scene.batch_size, scene.record)


class Divergence(Observer):
    """Compares log-probabilities of the same samples, or labelled tokens, at a task's ends.

    Quantities, after a task, by task name: ``kl``, the mean of KL(before || after) in nats; the
    task's own row has ``new`` 1, older ones 0.

    Args:
        settings: of the measurement.
        stream: whose tasks are sampled.
        seed: of the samples.
        batch_size: samples of a batch.
        record: keeps what was found.
    """

    def __init__(
        self,
        settings: DivergenceSettings,
        stream: Stream,
        seed: int,
        batch_size: int,
        record: Record,
    ) -> None:
        self.settings = settings
        self.stream = stream
        self.seed = seed
        self.batch_size = batch_size
        self.record = record
        self.start: dict[str, list[Tensor]] = {}

    def before_task(self, learner: BaseLearner, task: Task) -> None:
        """What the network says now."""
        self.start = {
            other.name: self._said(learner, other)
            for other in self.stream
            if other.index <= task.index
        }

    def after_task(self, learner: BaseLearner, task: Task) -> Mapping[str, Mapping[str, float]]:
        """Compare."""
        began = time.perf_counter()
        values = {}
        for other in self.stream:
            if other.name not in self.start:
                continue
            pairs = list(zip(self.start[other.name], self._said(learner, other), strict=True))
            rows = sum(len(now) for _, now in pairs)
            total = sum(divergence(then, now) * len(now) for then, now in pairs)
            values[other.name] = {"kl": total / rows, "new": int(other.index == task.index)}
        self.start = {}
        self.record.probe(
            "divergence",
            task=task.index,
            values=values,
            samples=self.settings.samples,
            seconds=time.perf_counter() - began,
        )
        return {}

    def _said(self, learner: BaseLearner, task: Task) -> list[Tensor]:
        drawn = task.sample(self.settings.samples, self.seed)
        pieces = split_batch(drawn, self.batch_size, learner.least_batch)
        return [log_probabilities(learner, piece, task) for piece in pieces]

    def state_dict(self) -> State:
        """Inside a task: what was said before it."""
        return {"start": {name: list(said) for name, said in self.start.items()}}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.start = {name: list(said) for name, said in state["start"].items()}
