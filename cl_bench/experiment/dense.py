"""Dense evaluation: old tasks and the new one, after some of its first steps."""

import time
from collections.abc import Mapping, Sequence

from cl_bench.contracts import State, Stream, Task
from cl_bench.experiment.observer import Observer
from cl_bench.experiment.probes.clock import Clock
from cl_bench.experiment.probes.untouched import measure
from cl_bench.learners import BaseLearner
from cl_bench.metrics import dynamics
from cl_bench.tracking import Record


class DenseEvaluation(Observer):
    """Scores every task learned so far and the current one, from the second task on.

    Each evaluation is a ``curve`` in the record; the last one comes after the task's last step.
    What old tasks went through (:func:`cl_bench.metrics.dynamics`) is recorded after it.

    Args:
        at: steps after which is evaluated, beside step 0 and the last one.
        max_samples: of every task.
        batch_size: samples of a batch.
        stream: whose tasks are scored.
        record: keeps the curve.
        clock: where training stands.
    """

    def __init__(
        self,
        at: Sequence[int],
        max_samples: int | None,
        batch_size: int,
        stream: Stream,
        record: Record,
        clock: Clock,
    ) -> None:
        self.at = tuple(at)
        self.steps = frozenset(n for n in at if n > 0)
        self.max_samples = max_samples
        self.batch_size = batch_size
        self.stream = stream
        self.record = record
        self.clock = clock
        self.curve: list[dict[str, float]] = []
        self.places: list[int] = []
        self.rates: list[float] = []

    def before_task(self, learner: BaseLearner, task: Task) -> None:
        """Step 0."""
        self.curve, self.places, self.rates = [], [], []
        if task.index > 0:
            self._evaluate(learner, task)

    def after_step(self, learner: BaseLearner, task: Task, step: int, rate: float) -> None:
        """One of the steps."""
        if task.index > 0:
            self._evaluate(learner, task)

    def after_task(self, learner: BaseLearner, task: Task) -> Mapping[str, Mapping[str, float]]:
        """The last point, and what the curve says."""
        if task.index == 0:
            return {}
        self._evaluate(learner, task)
        found = {
            old.name: dynamics(self.places, [point[old.name] for point in self.curve], self.rates)
            for old in self.stream
            if old.index < task.index
        }
        self.record.probe("dynamics", task=task.index, values=found)
        self.curve, self.places, self.rates = [], [], []
        return {}

    def _evaluate(self, learner: BaseLearner, task: Task) -> None:
        began = time.perf_counter()
        scores: dict[str, float] = {}
        details: dict[str, dict[str, float]] = {}
        for known in self.stream:
            if known.index > task.index:
                continue
            scores[known.name], details[known.name] = self._measure(learner, known, "test")
            for probe in known.probes:
                score, more = self._measure(learner, known, probe)
                details[known.name] |= {probe: score}
                details[known.name] |= {f"{probe}/{key}": value for key, value in more.items()}
        self.curve.append(scores)
        self.places.append(self.clock.step)
        self.rates.append(self.clock.rate_sum)
        self.record.probe(
            "curve",
            task=task.index,
            step=self.clock.step,
            values=scores,
            details=details,
            rate_sum=self.clock.rate_sum,
            seconds=time.perf_counter() - began,
        )

    def _measure(
        self, learner: BaseLearner, task: Task, what: str
    ) -> tuple[float, dict[str, float]]:
        data = task.scored if what == "test" else task.probes[what]
        return measure(learner, task, data, self.batch_size, self.max_samples)

    def state_dict(self) -> State:
        """The curve so far."""
        return {"curve": list(self.curve), "places": list(self.places), "rates": list(self.rates)}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.curve, self.places = list(state["curve"]), list(state["places"])
        self.rates = list(state["rates"])
