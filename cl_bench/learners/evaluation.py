"""Scores: of test data through the Trainer, of a batch at hand, and whether they mean anything."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cl_bench.contracts import Batch, Strategy, Task
from cl_bench.learners.objective import Objective
from cl_bench.parallel.ranks import average_, gathered

SCORE = "score"
"""What the mean of :meth:`Evaluation.score` is called among those of a test."""


class Evaluation(Objective):
    """Mixin: the score of every sample, and its mean over a task.

    Attributes:
        strategy: answers, and prepares the network for the task whose data comes.
        task_id_at_test: whether the strategy is told whose data it answers for.
        seed: of the order of data that is mixed.
        test_tasks: whose data the next test brings, in order.
    """

    strategy: Strategy
    task_id_at_test: bool
    seed: int
    test_tasks: list[Task]

    @abstractmethod
    def score(self, out: Tensor, batch: Batch) -> Tensor:
        """Score of every sample in [0, 1]; its mean is the task's entry in the matrix."""

    def finite(self, out: Tensor, batch: Batch) -> Tensor:
        """Whether every sample's outputs say anything: bool (n,).

        What is left out is minus infinity on purpose; NaN, plus infinity and nothing but minus
        infinity are not.
        """
        return out.amax(-1).isfinite().reshape(len(out), -1).all(1)

    def details(self, out: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """Further scores of every sample (n,), recorded beside the matrix; NaN does not count."""
        return {}

    def mixed(self, task: Task) -> tuple[int, int] | None:
        """What the order of the task's evaluation data follows from, where a score depends on it.

        That is where layers normalise evaluation data by the batch: seed and task then, so that all
        evaluations of the task have the same batches.
        """
        return (self.seed, task.index) if self.by_batch else None

    def expect_tests(self, tasks: Sequence[Task]) -> None:
        """The tasks whose test loaders the next ``trainer.test`` will bring, in order."""
        self.end_tests()
        self.test_tasks = list(tasks)
        self._sums: list[dict[str, Tensor]] = [{} for _ in tasks]

    def end_tests(self) -> None:
        """Leave the last loader's ``inference``, also where it ended early."""
        self._step.inside.close()
        self._step.loader = None

    def answer(self, batch: Batch, task: Task | None) -> Tensor:
        """What is scored: the strategy's answer, in the form of outputs."""
        return self.strategy.predict(self, batch, self.told(task))  # type: ignore[arg-type]

    def told(self, task: Task | None) -> Task | None:
        """What the strategy may know of whose data it answers for."""
        return task if self.task_id_at_test else None

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Score a batch of the ``dataloader_idx``-th expected task; returns scores by sample."""
        task = self.test_tasks[dataloader_idx]
        if self._step.loader != dataloader_idx:
            self.end_tests()
            context = self.strategy.inference(self, self.told(task))  # type: ignore[arg-type]
            self._step.inside.enter_context(context)
            self._step.loader = dataloader_idx
        out = self.answer(batch, task)
        if not bool(self.finite(out, batch).all()):
            raise self._diverged(f"outputs for test data of task {task.name!r} are not finite")
        score = self.score(out, batch)
        # Sums are plain tensors: a Trainer with precision=16-true halves modules of metrics.
        sums = self._sums[dataloader_idx]
        for name, values in {SCORE: score, **self.details(out, batch)}.items():
            known = values[~values.isnan()].double()
            seen = torch.stack([known.sum(), known.new_tensor(len(known))])
            sums[name] = sums[name] + seen if name in sums else seen
        return score

    def require_finite(self) -> None:
        """Before a strategy measures what was learned: the last step may have ruined it.

        Raises:
            DivergedError: outputs for the batch that was learned last are not finite.
        """
        batch = getattr(self._step, "batch", None)
        if batch is None:
            return
        batch = self._to_device(batch)
        with torch.no_grad(), self.evaluating():
            known = self.finite(self.outputs(batch), batch).all()
        if float(average_(known.float())) < 1:
            raise self._diverged("outputs for training data are not finite")

    def test_means(self) -> list[dict[str, float]]:
        """Means of :data:`SCORE` and :meth:`details` over each expected task's data.

        NaN where none counted.
        """
        means = []
        for everyones in zip(*gathered(self._sums), strict=True):
            sums: dict[str, Tensor] = {}
            for one in everyones:
                for name, seen in one.items():
                    sums[name] = sums[name] + seen.cpu() if name in sums else seen.cpu()
            means.append({name: float(total / count) for name, (total, count) in sums.items()})
        return means

    def performance(self, batch: Batch) -> float:
        """Mean score over the batch at the current weights; no side effects."""
        batch = self._to_device(batch)
        with torch.no_grad(), self.evaluating():
            out = self.answer(batch, self.task)
            return float(self.score(out, batch).where(self.finite(out, batch), math.nan).mean())
