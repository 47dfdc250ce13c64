"""Loss on the straight line between the weights of a run after two of its tasks."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from torch import Tensor

from cl_bench.contracts import State, Stream, Task
from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import Count
from cl_bench.experiment.observer import Observer
from cl_bench.experiment.probes.settings import ENABLED, Probe, Scene
from cl_bench.experiment.probes.untouched import untouched, weights_of
from cl_bench.learners import BaseLearner
from cl_bench.learners.observed import loss_on
from cl_bench.metrics.connectivity import barrier
from cl_bench.tracking import Record


@checked("probe.connectivity.")
@dataclass(frozen=True)
class ConnectivitySettings(Probe):
    """Losses of all tasks so far between the weights after an earlier task and those after this.

    Attributes:
        enabled: measure them.
        samples: training samples of each task.
        between: places on the line beside its ends.
        to: the weights after the task before, or after each of the earlier ones, all of which are
            kept in memory and in checkpoints then.
    """

    writes: ClassVar[bool] = True
    enabled: bool = False
    samples: Annotated[Count, ENABLED] = 200
    between: Annotated[Count, ENABLED] = 9
    to: Annotated[Literal["previous", "all"], ENABLED] = "previous"

    def observer(self, scene: Scene) -> Observer:
        """What watches."""
        return Connectivity(self, scene.stream, scene.record, scene.seed)


class Connectivity(Observer):
    """Whether what a run went through lies in one valley, after every task but the first.

    Mirzadeh et al., "Linear mode connectivity in multitask and continual learning", ICLR 2021, look
    at such lines; how high the loss rises on one is :func:`cl_bench.metrics.connectivity.barrier`.
    Running statistics are interpolated as weights are.

    Args:
        settings: places and samples.
        stream: whose tasks are evaluated.
        record: keeps the losses.
        seed: of the samples.
    """

    def __init__(
        self, settings: ConnectivitySettings, stream: Stream, record: Record, seed: int
    ) -> None:
        self.settings = settings
        self.stream = stream
        self.record = record
        self.seed = seed
        self.marks: dict[str, dict[str, Tensor]] = {}

    def after_task(self, learner: BaseLearner, task: Task) -> Mapping[str, Mapping[str, float]]:
        """Walk from the earlier weights to these."""
        began = time.perf_counter()
        end = {name: value.cpu() for name, value in weights_of(learner).items()}
        along = np.linspace(0, 1, self.settings.between + 2).tolist()
        samples = {
            known: known.sample(self.settings.samples, self.seed)
            for known in self.stream
            if known.index <= task.index
        }
        losses: dict[str, dict[str, list[float]]] = {}
        with untouched(learner):
            for name, start in self.marks.items():
                found: dict[str, list[float]] = {known.name: [] for known in samples}
                for a in along:
                    learner.load_state_dict(_between(start, end, a))
                    for known, batch in samples.items():
                        found[known.name].append(loss_on(learner, batch, known))
                losses[name] = found
        if losses:
            self.record.probe(
                "connectivity",
                task=task.index,
                values={
                    name: {f"barrier/{of}": barrier(along, path) for of, path in found.items()}
                    for name, found in losses.items()
                },
                along=along,
                losses=losses,
                seconds=time.perf_counter() - began,
            )
        self.marks = {**(self.marks if self.settings.to == "all" else {}), task.name: end}
        return {}

    def state_dict(self) -> State:
        """The weights after earlier tasks."""
        return {"marks": {name: dict(weights) for name, weights in self.marks.items()}}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.marks = {name: dict(weights) for name, weights in state["marks"].items()}


def _between(start: Mapping[str, Tensor], end: Mapping[str, Tensor], a: float) -> dict[str, Tensor]:
    """(1 - a) start + a end, exactly the ends at 0 and 1; counts and new names are the end's."""
    if a == 0:
        return {**end, **{name: value for name, value in start.items() if name in end}}
    return {
        name: (start[name].double().lerp(value.double(), a)).to(value)
        if name in start and value.is_floating_point()
        else value
        for name, value in end.items()
    }
