"""Scores of tasks, whoever carries the batches to the learner."""

from collections.abc import Callable, Sequence

from cl_bench.contracts import Task
from cl_bench.experiment.loader import EvalLoader, require_samples
from cl_bench.learners import BaseLearner
from cl_bench.learners.evaluation import SCORE
from cl_bench.parallel.ranks import rank, world


class Scorer:
    """What every engine's ``evaluate`` comes down to.

    Args:
        learner: whose weights are scored.
        num_workers: processes that fetch data ahead.
        test: has the learner score the data of every expected test, a loader each.

    Attributes:
        details: what the latest evaluation measured beside the scores, by task name.
    """

    def __init__(
        self,
        learner: BaseLearner,
        num_workers: int,
        test: Callable[[Sequence[EvalLoader]], None],
    ) -> None:
        self.learner = learner
        self.num_workers = num_workers
        self.test = test
        self.details: dict[str, dict[str, float]] = {}

    def evaluate(
        self, tasks: Sequence[Task], batch_size: int, max_samples: int | None
    ) -> dict[str, float]:
        """Mean score on every task's test data, by task name.

        What else was measured on the way, on the tasks' probes too, is then in :attr:`details`.

        Args:
            tasks: may be none.
            batch_size: samples of a batch.
            max_samples: of every task, a fixed random subset; None means all.

        Raises:
            UsageError: a task has no test samples, or outputs are not finite.
        """
        self.details = {task.name: {} for task in tasks}
        if not tasks:
            return {}
        for task in tasks:
            require_samples(task.scored, task.name, "test")
        probes = [(task, name) for task in tasks for name in task.probes]
        data = [(task, task.scored) for task in tasks]
        data += [(task, task.probes[name]) for task, name in probes]
        loaders = [
            EvalLoader(
                part,
                batch_size,
                max_samples,
                self.num_workers,
                (rank(), world()),
                self.learner.mixed(task),
            )
            for task, part in data
        ]
        self.learner.expect_tests([*tasks, *(task for task, _ in probes)])
        try:
            with self.learner.work.paused(), self.learner.in_turns():
                self.test(loaders)
        finally:
            self.learner.end_tests()
        more = self.learner.test_means()
        scores = [means.pop(SCORE) for means in more]
        for task, details in zip(tasks, more, strict=False):
            self.details[task.name].update(details)
        for (task, name), score, details in zip(
            probes, scores[len(tasks) :], more[len(tasks) :], strict=True
        ):
            found = {name: score, **{f"{name}/{key}": value for key, value in details.items()}}
            self.details[task.name].update(found)
        return {task.name: score for task, score in zip(tasks, scores, strict=False)}
