"""Opt-in measurements on a running experiment, for every strategy and model.

Each probe is a file of its own: a :class:`Probe`, which are its options, and the
:class:`~cl_bench.experiment.observer.Observer` that it makes. ``conf/probe`` names it, nothing else
does; :func:`watch` puts those together that were asked for. None of them changes a bit of the run.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cl_bench.contracts import State, Stream, Task, UsageError
from cl_bench.experiment.dense import DenseEvaluation
from cl_bench.experiment.experiment import EvalSettings
from cl_bench.experiment.loop import LoopSettings
from cl_bench.experiment.observer import AlignmentObserver, AlignmentSettings, Observer
from cl_bench.experiment.probes.clock import Clock
from cl_bench.experiment.probes.settings import Probe, ProbeSettings, Scene
from cl_bench.experiment.probes.untouched import same_randomness
from cl_bench.learners import BaseLearner
from cl_bench.tracking import Record

__all__ = [
    "Clock",
    "Observers",
    "Probe",
    "ProbeSettings",
    "Scene",
    "check_watch",
    "watch",
]


def watch(
    stream: Stream,
    learner: BaseLearner,
    record: Record,
    *,
    alignment: AlignmentSettings,
    probe: ProbeSettings | None,
    evaluation: EvalSettings,
    loop: LoopSettings,
) -> Observer | None:
    """Everything that is to watch the run, as one; None if nothing is.

    Raises:
        UsageError: a probe looks between steps that one ``training_step`` takes together, or needs
            what the stream does not declare.
    """
    probe, clock = probe or ProbeSettings(), Clock()
    scene = Scene(
        stream,
        learner,
        record,
        clock,
        probe.early,
        loop.seed,
        loop.batch_size,
        evaluation.batch_size,
    )
    members: dict[str, Observer] = {}
    if evaluation.dense:
        members["dense"] = DenseEvaluation(
            evaluation.dense, evaluation.dense_samples, evaluation.batch_size, stream, record, clock
        )
    members |= {
        name: member.observer(scene) for name, member in probe.members.items() if member.enabled
    }
    own = AlignmentObserver(alignment, loop.batch_size, loop.seed) if alignment.enabled else None
    if not members:
        return own
    if loop.pack > 1 and any(member.steps for member in members.values()):
        raise UsageError(
            f"{', '.join(members)} look between optimizer steps, but one training_step takes "
            f"{loop.pack} of them: add pack=1, or switch them off (eval.dense=[], "
            "probe.<name>.enabled=false)"
        )
    return Observers(members if own is None else {"alignment": own, **members}, clock, record)


def check_watch(stream: Stream, learner: BaseLearner, **settings: Any) -> None:
    """Raise what :func:`watch` would, before there is a record; the settings are those it takes."""
    nowhere: Any = None
    watch(stream, learner, nowhere, **settings)


class Observers(Observer):
    """Several observers as one: counts steps, restores random states, logs what each one costs.

    Args:
        members: by name.
        clock: shared with them.
        record: keeps the cost of every task.

    Attributes:
        seconds: what each has taken so far in this process.
    """

    def __init__(self, members: Mapping[str, Observer], clock: Clock, record: Record) -> None:
        self.members = dict(members)
        self.clock = clock
        self.record = record
        self.steps = frozenset().union(*(member.steps for member in self.members.values()))
        self.seconds = dict.fromkeys(self.members, 0.0)
        self._logged = dict(self.seconds)

    @property
    def watches_steps(self) -> bool:
        """Always: it adds up learning rates."""
        return True

    def before_pretraining(self, learner: BaseLearner) -> None:
        """Every member."""
        for name, member in self.members.items():
            with self._taking(name):
                member.before_pretraining(learner)

    def after_pretraining(self, learner: BaseLearner) -> None:
        """Every member."""
        for name, member in self.members.items():
            with self._taking(name):
                member.after_pretraining(learner)

    def before_task(self, learner: BaseLearner, task: Task) -> None:
        """Every member, with the clock at 0."""
        self.clock.step, self.clock.rate_sum = 0, 0.0
        for name, member in self.members.items():
            with self._taking(name):
                member.before_task(learner, task)

    def after_step(self, learner: BaseLearner, task: Task, step: int, rate: float) -> None:
        """Those whose step it is."""
        if step == self.clock.step:  # gradients are still being accumulated
            return
        self.clock.step = step
        self.clock.rate_sum += rate
        if step not in self.steps:
            return
        for name, member in self.members.items():
            if step in member.steps:
                with self._taking(name):
                    member.after_step(learner, task, step, rate)

    def after_task(self, learner: BaseLearner, task: Task) -> Mapping[str, Mapping[str, float]]:
        """Every member's numbers per layer, merged."""
        found: dict[str, dict[str, float]] = {}
        for name, member in self.members.items():
            with self._taking(name):
                for layer, values in member.after_task(learner, task).items():
                    found.setdefault(layer, {}).update(values)
        taken = {name: spent - self._logged[name] for name, spent in self.seconds.items()}
        self._logged = dict(self.seconds)
        self.record.probe("cost", task=task.index, values={}, seconds=taken)
        return found

    @contextmanager
    def _taking(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        with same_randomness():
            yield
        self.seconds[name] += time.perf_counter() - began

    def state_dict(self) -> State:
        """Every member's, and the clock."""
        states = {name: member.state_dict() for name, member in self.members.items()}
        return {**states, "clock": [self.clock.step, self.clock.rate_sum]}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.clock.step, self.clock.rate_sum = state["clock"]
        for name, member in self.members.items():
            member.load_state_dict(state[name])
