"""The engine: what learns a task and scores tasks, whatever its loop looks like inside."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from cl_bench.contracts.plan import Plan
from cl_bench.contracts.task import Task

LayerMetrics = Mapping[str, Mapping[str, float]]
"""Numbers per layer after a task: ``{layer: {quantity: value}}``."""


class Engine(Protocol):
    """Learns a stream's tasks one by one, and scores tasks in between.

    The outer loop knows no more of it than this. It calls, in this order::

        evaluate -> between_tasks(0)
            per task:  learn -> evaluate -> between_tasks(t + 1)
        summary -> figures -> remarks

    A task that is skipped is not evaluated either. A resumed run begins with ``learn``.
    """

    @property
    def details(self) -> Mapping[str, Mapping[str, float]]:
        """What the latest :meth:`evaluate` measured beside the scores, by task name."""

    def learn(self, task: Task, plan: Plan | None) -> LayerMetrics:
        """Follow ``plan``, let the strategy remember the task, and tell what it says of layers.

        Afterwards the learner holds the task's final weights, and nothing that the strategy
        attached to it. Where the run was resumed inside this task, training goes on from there.

        Args:
            task: the task that is learned.
            plan: of the strategy for it; None skips the task.

        Returns:
            The task's numbers per layer; none where it was skipped.

        Raises:
            UsageError: no samples, labels outside the head, or a loss that is not finite.
        """

    def evaluate(
        self, tasks: Sequence[Task], batch_size: int, max_samples: int | None
    ) -> dict[str, float]:
        """Mean score in [0, 1] on every task's test data, by task name; changes no weight.

        Args:
            tasks: whose test data, and whose probes, are scored; may be none.
            batch_size: samples of a batch.
            max_samples: of every task, a fixed random subset; None means all.

        Raises:
            UsageError: a task has no test samples, or outputs are not finite.
        """

    def between_tasks(self, t: int) -> None:
        """All tasks before ``t`` are learned and scored: keep what a resumed run goes on from.

        Raises:
            KeyboardInterrupt: a signal came meanwhile; the run ends here.
        """

    def summary(self) -> dict[str, Any]:
        """What joins the run's summary: plain values."""

    def figures(self, directory: Path) -> list[Path]:
        """Draw what only the engine knows into the run's directory; where the pictures are."""

    def remarks(self) -> list[str]:
        """Lines for people, at the end of the run."""
