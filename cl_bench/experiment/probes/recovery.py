"""Recovery: learn one half of an old task anew, on a copy, and see what the other half scores."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from cl_bench.contracts import Recovery, State, Stream, Task, UsageError, derive_seed
from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import Count, Index, Rate
from cl_bench.experiment.loader import TrainLoader
from cl_bench.experiment.observer import Observer
from cl_bench.experiment.probes.clock import Clock
from cl_bench.experiment.probes.settings import ENABLED, Probe, Scene
from cl_bench.experiment.probes.untouched import measure, untouched
from cl_bench.experiment.steps import steps_of
from cl_bench.experiment.trainers import seed_training
from cl_bench.learners import BaseLearner
from cl_bench.learners.observed import freed, plain_optimizer
from cl_bench.metrics import alignment_ratio, at_chance, drops
from cl_bench.subspace import unconfined
from cl_bench.tracking import Record


@checked("probe.recovery.")
@dataclass(frozen=True)
class RecoverySettings(Probe):
    """Learning one half of an old task anew, to see what of the other half is still known.

    Attributes:
        enabled: do it after every task, for every task learned so far.
        steps: optimizer steps, from a fresh optimizer of the run's kind.
        rate: times ``optimizer.lr``; None takes the recovered task's own.
        samples: of the half that is scored, and of the control; None means all.
        at: steps of a task after which it is done as well, for old tasks.
    """

    writes: ClassVar[bool] = True
    enabled: bool = False
    steps: Annotated[Index, ENABLED] = 50
    rate: Annotated[Rate | None, ENABLED] = None
    samples: Annotated[Count | None, ENABLED] = 1000
    at: Annotated[Sequence[Index], ENABLED] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "at", steps_of(self.at))

    def observer(self, scene: Scene) -> Observer:
        """What watches."""
        return RecoveryProbe(
            self,
            scene.batch_size,
            scene.eval_batch_size,
            scene.stream,
            scene.record,
            scene.clock,
            scene.seed,
        )


class RecoveryProbe(Observer):
    """Splits what an old task lost as :mod:`cl_bench.metrics.knowledge` says.

    The recipe is the same for every strategy: a fresh optimizer, every parameter free, no strategy
    at work, float32, order and dropout from the run's seed.

    Args:
        settings: the recipe.
        batch_size: samples of a step, and of a batch that is scored.
        eval_batch_size: samples of a batch that is scored.
        stream: whose tasks are recovered.
        record: keeps what was found.
        clock: where training stands.
        seed: of the order.

    Raises:
        UsageError: no task of the stream declares halves.
    """

    def __init__(
        self,
        settings: RecoverySettings,
        batch_size: int,
        eval_batch_size: int,
        stream: Stream,
        record: Record,
        clock: Clock,
        seed: int,
    ) -> None:
        if all(task.recovery is None for task in stream):
            raise UsageError(
                f"probe.recovery.enabled=true: no task of stream {stream.name!r} declares disjoint "
                "halves, neither of which tells anything about the other's answers; use a stream "
                "that does (+stream=biography/tiny), or leave recovery off"
            )
        self.settings = settings
        self.steps = frozenset(n for n in settings.at if n > 0)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.stream = stream
        self.record = record
        self.clock = clock
        self.seed = seed
        self.learned: dict[str, dict[str, float]] = {}

    def before_task(self, learner: BaseLearner, task: Task) -> None:
        """Step 0, if that is asked for."""
        if 0 in self.settings.at and task.index > 0:
            self._probe(learner, task, upto=task.index, inside=True)

    def after_step(self, learner: BaseLearner, task: Task, step: int, rate: float) -> None:
        """Old tasks, inside a new one."""
        if task.index > 0:
            self._probe(learner, task, upto=task.index, inside=True)

    def after_task(self, learner: BaseLearner, task: Task) -> Mapping[str, Mapping[str, float]]:
        """Every task learned so far."""
        self._probe(learner, task, upto=task.index + 1, inside=False)
        return {}

    def _probe(self, learner: BaseLearner, task: Task, upto: int, inside: bool) -> None:
        began = time.perf_counter()
        found = {
            known.name: self._take_apart(learner, known, known.recovery)
            for known in self.stream
            if known.index < upto and known.recovery is not None
        }
        if not found:
            return
        self.record.probe(
            "alignment",
            task=task.index,
            step=self.clock.step,
            inside=inside,
            values=found,
            seconds=time.perf_counter() - began,
        )

    def _take_apart(self, learner: BaseLearner, task: Task, halves: Recovery) -> dict[str, float]:
        most, size = self.settings.samples, self.eval_batch_size
        performance, before = measure(learner, task, halves.test, size, most)
        found = {"perf": performance, **_named("perf", before)}
        for probe, data in task.probes.items():
            if data is not halves.control:
                found[probe] = measure(learner, task, data, size, most)[0]
        with untouched(learner):
            self._relearn(learner, task, halves)
            recovered, after = measure(learner, task, halves.test, size, most)
            found |= {"recovered": recovered, **_named("recovered", after)}
            holds = False
            if halves.control is not None and halves.chance is not None:
                control, _ = measure(learner, task, halves.control, size, most)
                asked = min(most or len(halves.control), len(halves.control))
                holds = at_chance(control, halves.chance, asked)
                found |= {"recover_ctrl": control, "chance": halves.chance}
        found["alignment_ratio"] = alignment_ratio(performance, recovered)
        reference = self.learned.setdefault(
            task.name, {"perf": performance, "recovered": recovered, "holds": float(holds)}
        )
        found |= drops(
            performance,
            recovered,
            reference["perf"],
            reference["recovered"],
            holds and bool(reference["holds"]),
        )
        return found

    def _relearn(self, learner: BaseLearner, task: Task, halves: Recovery) -> None:
        seed = derive_seed(self.seed, "recovery", task.index)
        seed_training(seed)
        rate = task.rate if self.settings.rate is None else self.settings.rate
        optimizer = plain_optimizer(learner, freed(learner), rate)
        loader = TrainLoader(
            halves.train, self.batch_size, seed, task.index, least=learner.least_batch
        )
        left = self.settings.steps
        learner.train()
        with learner.strategy.inference(learner, learner.told(task)), unconfined():
            while left > 0:
                for batch in loader:
                    moved = learner._to_device(batch)
                    optimizer.zero_grad()
                    learner.loss(learner(moved), moved).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    left -= 1
                    if left == 0:
                        break

    def state_dict(self) -> State:
        """What every task scored, and could be brought back to, right after it was learned."""
        return {"learned": {name: dict(values) for name, values in self.learned.items()}}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.learned = {name: dict(values) for name, values in state["learned"].items()}


def _named(when: str, details: Mapping[str, float]) -> dict[str, float]:
    """Those that are not by kind of question: ``first_token``, ``type_rate``, ..."""
    return {f"{when}_{key}": value for key, value in details.items() if "/" not in key}
