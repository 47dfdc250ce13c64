"""Test-then-train, in the place of a Trainer."""

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from cl_bench.contracts import (
    Batch,
    Data,
    Plan,
    State,
    Strategy,
    Task,
    batch_sizes,
    derive_seed,
    generator,
    split_batch,
)
from cl_bench.contracts.engine import LayerMetrics
from cl_bench.contracts.strategy import overrides
from cl_bench.experiment.interrupts import Interrupts
from cl_bench.experiment.loader import EvalLoader, in_training, require_labels, require_samples
from cl_bench.experiment.loop import LoopSettings
from cl_bench.experiment.observer import Observer
from cl_bench.experiment.resuming import keep_between
from cl_bench.experiment.scoring import Scorer
from cl_bench.experiment.snapshot import RunState, set_random_states, tensor_bytes
from cl_bench.experiment.trainers import TrainerFactory, seed_training
from cl_bench.learners import BaseLearner
from cl_bench.metrics.prequential import Prequential, recoveries
from cl_bench.packed import ShortSteps
from cl_bench.streaming.figure import write_prequential_figure
from cl_bench.streaming.settings import Streaming
from cl_bench.tracking import ProgressDisplay, Record


class StreamingEngine:
    """Learns tasks in one pass: a batch is answered, its answer scored, and then it is learned.

    Where one task ends and the next begins, something is known to have changed: a drift mark. Tasks
    are scored on their test data in between as by any engine.

    Args:
        learner: what learns.
        strategy: observes batches, or constrains steps.
        trainer: not used: a plain loop learns.
        settings: seed, batch size.
        observer: watches the run from the side; None means nobody does.
        record: keeps the numbers.
        progress: shows where training stands.
        state: of the run, with its checkpoints; None keeps it without writing any.
        interrupts: signals that wait for a checkpoint; None lets none wait.
        streaming: the settings.
        device: where the learner lives.

    Attributes:
        prequential: a bit for every sample answered.
        seconds: spent on answering and on learning.
    """

    def __init__(
        self,
        learner: BaseLearner,
        strategy: Strategy,
        trainer: TrainerFactory | None,
        settings: LoopSettings,
        observer: Observer | None,
        record: Record,
        progress: ProgressDisplay,
        state: RunState | None = None,
        interrupts: Interrupts | None = None,
        *,
        streaming: Streaming,
        device: str = "cpu",
    ) -> None:
        self.learner = learner.to(device)
        self.device = torch.device(device)
        self.strategy = learner.strategy = learner.acting = strategy
        learner.equip(strategy)
        self.settings = settings
        self.observer = observer
        self.record = record
        self.progress = progress
        self.state = state or RunState(learner, strategy, observer, record, None)
        self.state.engine = self
        self.interrupts = interrupts or Interrupts()
        self.streaming = streaming
        self.prequential = Prequential(streaming.window, streaming.fading)
        self.seconds = {"predict": 0.0, "learn": 0.0}
        self._scorer = Scorer(learner, settings.num_workers, self._test)
        self._surrounds = overrides(strategy, "inference")
        self._steps: ShortSteps | None = None
        self._taken = 0

    # -- a task -----------------------------------------------------------------------------------

    def learn(self, task: Task, plan: Plan | None) -> LayerMetrics:
        """Meet the task's samples once, and return its numbers per layer.

        Raises:
            UsageError: no samples, labels outside the head, or a loss that is not finite.
        """
        assert plan is not None  # strategies that skip tasks are refused
        require_samples(plan.data, task.name, "training")
        require_labels(task)
        learner, strategy, seed = self.learner, self.strategy, self.settings.seed
        seed_training(derive_seed(seed, "training", task.index))
        learner.begin(task, strategy, plan.start)
        begun = self.state.resume_task()
        if begun is None:
            self._steps, self._taken = None, 0
            if task.index:
                self.prequential.mark()
            if self.observer:
                with learner.work.paused():
                    self.observer.before_task(learner, task)
        optimizer = None if begun is None else begun["optimizer"]
        if optimizer is not None:
            self._optimizing().load_state_dict(optimizer)
        if begun is not None:
            self._taken = begun["taken"]
            set_random_states(begun["random"])
        self._pass(task, plan.data, 0 if begun is None else begun["position"])
        return self._end(task)

    def _pass(self, task: Task, data: Data, first: int) -> None:
        """All batches from the ``first`` on."""
        order = self._order(task, len(data))
        shown = in_training(
            data, self.strategy.needs, derive_seed(self.settings.seed, "augment", task.index, 0)
        )
        bounds = list(self._bounds(task, len(data)))
        self.learner.stand(None, 0, 1, len(bounds))
        self.progress.task(task.index, len(bounds), before=first)
        every = self.state.every_steps
        due = (first // every + 1) * every
        for i in range(first, len(bounds)):
            start, end = bounds[i]
            batch = self._moved(shown[order[start:end]])
            warm = task.index == 0 and end <= self.streaming.warmup
            if not warm:
                self._answer(task, batch)
            self._observe(task, batch)
            self.progress.advance()
            if not warm and (end // self.streaming.every > start // self.streaming.every):
                self._tell(task, end)
            if i + 1 < len(bounds) and (i + 1 >= due or self.interrupts.requested is not None):
                self._save(task, i + 1, scheduled=i + 1 >= due)
                due = ((i + 1) // every + 1) * every
        if len(data) % self.streaming.every:
            self._tell(task, len(data))

    def _order(self, task: Task, count: int) -> Tensor:
        """As the samples come: in time, where the task has one, else drawn."""
        if task.ordered:
            return torch.arange(count)
        return torch.randperm(count, generator=generator(self.settings.seed, "order", task.index))

    def _bounds(self, task: Task, count: int) -> Iterator[tuple[int, int]]:
        """First and one past the last sample of each batch; what warms up is one."""
        start = self.streaming.warmup if task.index == 0 else 0
        if start:
            yield 0, start
        for size in batch_sizes(count - start, self.settings.batch_size, self.learner.least_batch):
            yield start, start + size
            start += size

    def _moved(self, batch: Batch) -> Batch:
        if self.device.type == "cpu":
            return batch
        return {name: value.to(self.device) for name, value in batch.items()}

    @torch.no_grad()
    def _answer(self, task: Task, batch: Batch) -> None:
        learner, began = self.learner, time.perf_counter()
        learner.eval()
        told = learner.told(task)
        inside = self.strategy.inference(learner, told) if self._surrounds else nullcontext()
        with inside:
            score = learner.score(learner.answer(batch, task), batch)
        self.seconds["predict"] += time.perf_counter() - began
        self.prequential.add(score, batch["y"])

    def _observe(self, task: Task, batch: Batch) -> None:
        began = time.perf_counter()
        if not self.strategy.observe(self.learner, batch):
            self.learner.train()
            steps = self._stepping()
            constrain = functools.partial(self.strategy.constrain, self.learner)
            size, least = self.settings.batch_size, self.learner.least_batch
            for part in split_batch(batch, size, least):  # more than one while it warms up
                loss = self.learner._learn(part)
                steps.take(loss, constrain)
                self.learner._watch(loss)
                self._taken += 1
                if self.observer and self.observer.watches_steps:
                    rate = self._optimizer.param_groups[0]["lr"]
                    with self.learner.work.paused():
                        self.observer.after_step(self.learner, task, self._taken, rate)
        self.seconds["learn"] += time.perf_counter() - began

    def _optimizing(self) -> Optimizer:
        optimizer: Optimizer = self.learner.configure_optimizers()
        self._optimizer, self._steps = optimizer, ShortSteps(optimizer)
        return optimizer

    def _stepping(self) -> ShortSteps:
        if self._steps is None:
            self._optimizing()
        assert self._steps is not None
        return self._steps

    def _tell(self, task: Task, position: int) -> None:
        values = self.prequential.values()
        self.record.prequential(
            task=task.index,
            position=position,
            answered=len(self.prequential),
            state_bytes=tensor_bytes(dict(self.strategy.state_dict())),
            predict_seconds=self.seconds["predict"],
            learn_seconds=self.seconds["learn"],
            **values,
        )
        self.progress.say(
            f"{position:,} samples  last {self.streaming.window}: {values['window']:.1%}"
        )

    def _save(self, task: Task, position: int, scheduled: bool) -> None:
        inside = {
            "position": position,
            "taken": self._taken,
            "optimizer": None if self._steps is None else self._optimizer.state_dict(),
        }
        self.state.save_inside(task.index, position, inside, scheduled=scheduled)
        self.interrupts.stop()

    def _end(self, task: Task) -> LayerMetrics:
        learner, strategy = self.learner, self.strategy
        if self._taken:
            rate = self._optimizer.param_groups[0]["lr"]
            self.record.epoch(task.index, 1, learner.epoch_loss(), rate, 0.0, self._taken)
            learner.require_finite()
        strategy.consolidate(learner, task, strategy.collect(learner, task))
        strategy.release(learner)
        learner.equip(strategy)
        self.state.optimizer_steps += self._taken
        layers = {name: dict(values) for name, values in strategy.metrics().items()}
        if self.observer:
            with learner.work.paused():
                watched = self.observer.after_task(learner, task)
            for name, values in watched.items():
                layers.setdefault(name, {}).update(values)
        return layers

    # -- evaluation -------------------------------------------------------------------------------

    @property
    def details(self) -> Mapping[str, Mapping[str, float]]:
        """What the latest evaluation measured beside the scores, by task name."""
        return self._scorer.details

    def evaluate(
        self, tasks: Sequence[Task], batch_size: int, max_samples: int | None
    ) -> dict[str, float]:
        """Mean score on every task's test data, by task name."""
        return self._scorer.evaluate(tasks, batch_size, max_samples)

    @torch.no_grad()
    def _test(self, loaders: Sequence[EvalLoader]) -> None:
        self.learner.eval()
        for i, loader in enumerate(loaders):
            for n, batch in enumerate(loader):
                self.learner.test_step(self._moved(batch), n, i)

    def between_tasks(self, t: int) -> None:
        """All tasks before ``t`` are learned and scored: keep that, and end if a signal came."""
        keep_between(self.state, self.interrupts, t)

    # -- what a run leaves ------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """Prequential scores, samples after each drift until they are back, and times."""
        found: dict[str, Any] = {
            f"prequential_{name}": value for name, value in self.prequential.values().items()
        }
        spent = sum(self.seconds.values())
        return {
            **found,
            "answered": len(self.prequential),
            "drifts": list(self.prequential.drifts),
            "recovery_samples": recoveries(
                self.prequential.bits, self.prequential.drifts, self.streaming.window
            ),
            "predict_seconds": self.seconds["predict"],
            "learn_seconds": self.seconds["learn"],
            "sample_seconds": spent / max(1, len(self.prequential)),
        }

    def remarks(self) -> list[str]:
        """The same for people."""
        found, n = self.prequential.values(), max(1, len(self.prequential))
        each = 1e6 * sum(self.seconds.values()) / n
        return [
            f"prequential accuracy {found['accuracy']:.1%} over {n:,} samples "
            f"(faded {found['faded']:.1%}, kappa {found['kappa']:.2f}), {each:.0f} us a sample"
        ]

    def figures(self, directory: Path) -> list[Path]:
        """The windowed accuracy, with drift marks."""
        return [write_prequential_figure(directory, self.prequential)]

    def state_dict(self) -> State:
        """What of the engine outlives a task."""
        return {"prequential": self.prequential.state_dict(), "seconds": dict(self.seconds)}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.prequential.load_state_dict(state["prequential"])
        self.seconds = dict(state["seconds"])
