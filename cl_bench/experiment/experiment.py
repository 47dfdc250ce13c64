"""The outer loop: one task after another, and a row of the accuracy matrix after each."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from torch import Tensor

from cl_bench.contracts import Batch, Engine, Strategy, Stream, Task
from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import Count, Index, OnlyWith
from cl_bench.experiment.steps import steps_of
from cl_bench.tracking import ProgressDisplay, Record


@checked("eval.")
@dataclass(frozen=True)
class EvalSettings:
    """The evaluation budget.

    Attributes:
        tasks: ``all`` fills the matrix; ``seen`` leaves tasks that come later out.
        max_samples: test samples per task, a fixed random subset; None means all of them.
        batch_size: samples of a batch.
        dense: steps of every task but the first after which old tasks and the task are scored;
            unless there are none, its beginning and its end are among them.
        dense_samples: test samples of each of them then; None means all.
    """

    tasks: Literal["seen", "all"] = "all"
    max_samples: Count | None = None
    batch_size: Count = 2000
    dense: Sequence[Index] = ()
    dense_samples: Annotated[Count | None, OnlyWith("dense")] = 500

    def __post_init__(self) -> None:
        object.__setattr__(self, "dense", steps_of(self.dense))


class Experiment:
    """A stream learned under a strategy.

    Args:
        stream: the tasks.
        strategy: which updates are allowed.
        engine: learns and evaluates.
        evaluation: how much is evaluated.
        record: keeps every number.
        progress: shows them as they come.
        answer: the model's outputs for a batch of a task, for tasks that ask the model for data;
            None where none does.
    """

    def __init__(
        self,
        stream: Stream,
        strategy: Strategy,
        engine: Engine,
        evaluation: EvalSettings,
        record: Record,
        progress: ProgressDisplay,
        answer: Callable[[Task, Batch], Tensor] | None = None,
    ) -> None:
        self.stream = stream
        self.strategy = strategy
        self.engine = engine
        self.evaluation = evaluation
        self.record = record
        self.progress = progress
        self.answer = answer

    def run(self, begin: int | None = None) -> np.ndarray:
        """Learn the stream.

        Args:
            begin: index of the task to go on with, in a run that is resumed.

        Returns:
            The accuracy matrix (T + 1, T) in [0, 1]; row 0 is before any training.
        """
        if begin is None:
            self._evaluate(None, seen=0)
            self.engine.between_tasks(0)
        for t, task in enumerate(self.stream):
            if t < (begin or 0):
                continue
            started = time.perf_counter()
            told = self._prepare(task)
            plan = self.strategy.plan(self.stream, t)
            layers = self.engine.learn(task, plan)
            if told is not None:  # not before: a run that is resumed inside the task asks again
                self.record.probe("labels", task=t, values=told)
            if layers:
                self.record.layers(task=t, layers=layers)
            if task.kind == "forget":
                self._ask_again(task)
            elif plan is not None:  # else there is nothing new to measure, and no task learned
                self._evaluate(task, seen=t + 1)
                self.progress.evaluated(
                    self.record.matrix,
                    t + 1,
                    time.perf_counter() - started,
                    layers,
                    [one.metric for one in self.stream],
                )
                if t + 1 == self._learned < len(self.stream):
                    self._ask_again(task)
            self.engine.between_tasks(t + 1)
        return self.record.matrix

    def _prepare(self, task: Task) -> Mapping[str, float] | None:
        if self.answer is None:
            return None
        return task.prepare(functools.partial(self.answer, task))

    def _evaluate(self, task: Task | None, seen: int) -> None:
        begun = time.perf_counter()
        tasks = [
            t for i, t in enumerate(self.stream.tasks[: self._learned]) if self._wanted(t, i, seen)
        ]
        scores = self.engine.evaluate(
            tasks, self.evaluation.batch_size, self.evaluation.max_samples
        )
        self.record.row(
            row=seen,
            task=None if task is None else task.index,
            scores=scores,
            seconds=time.perf_counter() - begun,
            details=self.engine.details,
        )

    @property
    def _learned(self) -> int:
        """Tasks that are learned; requests to forget come behind them."""
        return sum(task.kind == "learn" for task in self.stream)

    def _ask_again(self, task: Task) -> None:
        """Scores of tasks and of what requests name, after as many requests as were met."""
        begun = time.perf_counter()
        scores = self.engine.evaluate(
            list(self.stream), self.evaluation.batch_size, self.evaluation.max_samples
        )
        named = {one.name for one in self.stream if one.kind == "forget"}
        met = task.index + 1 - self._learned
        self.record.forget(
            request=met,
            task=task.index,
            scores={name: score for name, score in scores.items() if name not in named},
            forgotten={name: score for name, score in scores.items() if name in named},
            details={k: dict(v) for k, v in self.engine.details.items() if v},
            seconds=time.perf_counter() - begun,
        )
        if met:
            self.progress.note(
                f"request {met} {task.name}  still known {100 * scores[task.name]:5.1f}"
            )

    def _wanted(self, task: Task, position: int, seen: int) -> bool:
        """Whether to evaluate on a task: a head that was never trained has nothing to say."""
        if position < seen:
            return True
        return self.evaluation.tasks == "all" and self.stream.scenario == "domain"
