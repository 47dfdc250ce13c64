"""The inner part of the loop: Lightning's Trainer learns one task, and evaluates."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning import Trainer

from cl_bench.contracts import Plan, Strategy, Task, derive_seed
from cl_bench.contracts.engine import LayerMetrics
from cl_bench.experiment.hooks import Parts, TaskHooks
from cl_bench.experiment.interrupts import Interrupts, without_signals
from cl_bench.experiment.loader import (
    EvalLoader,
    TrainLoader,
    require_batch,
    require_labels,
    require_samples,
    require_validation,
)
from cl_bench.experiment.loop import LoopSettings
from cl_bench.experiment.observer import Observer
from cl_bench.experiment.plateau import BestEpoch, PerStep, Plateau
from cl_bench.experiment.resuming import TaskCheckpoints, keep_between
from cl_bench.experiment.scoring import Scorer
from cl_bench.experiment.snapshot import RunState
from cl_bench.experiment.stage import Stage
from cl_bench.experiment.token_batches import token_counts
from cl_bench.experiment.trainers import (
    TrainerFactory,
    as_interrupt,
    quiet_lightning,
    seed_training,
)
from cl_bench.learners import BaseLearner
from cl_bench.parallel.ranks import rank
from cl_bench.tracking import ProgressDisplay, Record


class LightningEngine:
    """Learns tasks with a fresh Trainer and a fresh optimizer each.

    Args:
        learner: what learns.
        strategy: which updates are allowed.
        trainer: builds a ``lightning.Trainer``; called with the callbacks of a task.
        settings: seed, batch size, packing.
        observer: watches the run from the side; None means nobody does.
        record: keeps the numbers of every epoch.
        progress: shows where training stands.
        state: of the run, with its checkpoints; None keeps it without writing any.
        interrupts: signals that wait for a checkpoint; None lets none wait.
    """

    def __init__(
        self,
        learner: BaseLearner,
        strategy: Strategy,
        trainer: TrainerFactory,
        settings: LoopSettings,
        observer: Observer | None,
        record: Record,
        progress: ProgressDisplay,
        state: RunState | None = None,
        interrupts: Interrupts | None = None,
    ) -> None:
        self.learner = learner
        self.strategy = strategy
        self.trainer = trainer
        self.settings = settings
        self.observer = observer
        self.state = state or RunState(learner, strategy, observer, record, None)
        self.interrupts = interrupts or Interrupts()
        self._parts = Parts(learner, strategy, settings, observer, record, progress, self.state)
        self._scorer = Scorer(learner, settings.num_workers, self._test)
        learner.strategy = learner.acting = strategy
        learner.equip(strategy)
        schedule = settings.schedule
        self.learner.schedule = None if isinstance(schedule, Plateau | PerStep) else schedule

    def learn(self, task: Task, plan: Plan | None) -> LayerMetrics:
        """Train, phase by phase, consolidate, and return the task's numbers per layer.

        Args:
            task: the task that is learned.
            plan: of the strategy for it; None skips the task.

        Raises:
            UsageError: no samples, labels outside the head, or a loss that is not finite.
        """
        if plan is None:
            self.learner.begin(task, self.strategy)
            self.strategy.release(self.learner)
            return {}
        require_samples(plan.data, task.name, "training")
        require_labels(task)
        layers: dict[str, dict[str, float]] = {}
        stage: Stage | None = Stage.of_task(task, plan)
        while stage is not None:
            stage = self._train(task, plan, stage, layers)
        return layers

    def _train(
        self, task: Task, plan: Plan, stage: Stage, layers: dict[str, dict[str, float]]
    ) -> Stage | None:
        """One stage with a Trainer of its own; returns the next. After the last, ``layers``."""
        s, least = self.settings, self.learner.least_batch
        seed = s.seed if not stage.index else derive_seed(s.seed, "phase", stage.index)
        phase = stage.phase.name if stage.phase else None
        require_batch(stage.data, task.name, phase, least if self.learner.need_company else 1)
        how = (s.batch_size, seed, task.index, s.pack, s.num_workers, least)
        most = s.batch_tokens
        tokens = most and (token_counts(self.learner, stage.data, most, task.name), most)
        data = TrainLoader(stage.data, *how, needs=self.strategy.needs, tokens=tokens or None)
        plateau, validation = None, None
        if isinstance(s.schedule, Plateau) and not stage.index and stage.epochs != 0:
            require_validation(task)
            plateau = BestEpoch(s.schedule, self.learner, self.strategy)
            validation = EvalLoader(
                task.validation, s.validation_batch_size, mixed=self.learner.mixed(task)
            )
        checkpoints = TaskCheckpoints(self.state, task.index, stage, data, self.interrupts, plateau)
        hooks = TaskHooks(self._parts, task, plan, stage, data, checkpoints, plateau, layers)
        with quiet_lightning(), as_interrupt():
            apart = (rank(),) if rank() else ()
            seed_training(derive_seed(seed, "training", task.index, *apart))
            epochs = {} if stage.epochs is None else {"max_epochs": stage.epochs}
            trainer = without_signals(self.trainer(callbacks=[hooks], **epochs))
            trainer.fit(self.learner, data, validation)
        _let_go(trainer)
        taken = data.packs.taken(trainer, self.learner.learned_steps)
        if hooks.resumed_later is not None:
            return hooks.resumed_later
        following = stage.next(hooks.phases, checkpoints.batches, taken)
        if following is None:
            self.state.optimizer_steps += stage.steps + taken
        return following

    def summary(self) -> dict[str, Any]:
        """What joins the run's summary."""
        return {}

    def remarks(self) -> list[str]:
        """Lines for people, at the end of the run."""
        return []

    def figures(self, directory: Path) -> list[Path]:
        """Draw pictures of what only the engine knows into the run's directory."""
        return []

    def between_tasks(self, t: int) -> None:
        """All tasks before ``t`` are learned and scored: keep that, and end if a signal came."""
        keep_between(self.state, self.interrupts, t)

    @property
    def details(self) -> Mapping[str, Mapping[str, float]]:
        """What the latest evaluation measured beside the scores, by task name."""
        return self._scorer.details

    def evaluate(
        self, tasks: Sequence[Task], batch_size: int, max_samples: int | None
    ) -> dict[str, float]:
        """Mean score on every task's test data, by task name."""
        return self._scorer.evaluate(tasks, batch_size, max_samples)

    def _test(self, loaders: Sequence[EvalLoader]) -> None:
        """Have the learner score the data of every expected test."""
        with quiet_lightning(), as_interrupt():
            # What is put together in inference mode could not be learned again.
            how = {"inference_mode": False} if self.learner.sharded else {}
            trainer = without_signals(self.trainer(callbacks=[], **how))
            trainer.test(self.learner, loaders, verbose=False)


def _let_go(trainer: Trainer) -> None:
    """Of gradients and optimizer states: the learner knows its last Trainer until the next."""
    for optimizer in trainer.optimizers:
        optimizer.zero_grad(set_to_none=True)
        optimizer.state.clear()
