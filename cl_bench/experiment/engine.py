"""The inner part of the loop: Lightning's Trainer learns one task, and evaluates."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch.distributed.tensor.experimental import implicit_replication
from torch.nn import Parameter

from cl_bench.contracts import Phase, Plan, Progress, Strategy, Task, derive_seed
from cl_bench.contracts.engine import LayerMetrics
from cl_bench.experiment.interrupts import Interrupts, without_signals
from cl_bench.experiment.loader import (
    EvalLoader,
    TrainLoader,
    require_labels,
    require_samples,
    require_validation,
)
from cl_bench.experiment.loop import LoopSettings
from cl_bench.experiment.observer import Observer
from cl_bench.experiment.plateau import BestEpoch, Cosine, Plateau
from cl_bench.experiment.rates import rebuild_optimizer, set_rates
from cl_bench.experiment.resuming import TaskCheckpoints, keep_between
from cl_bench.experiment.scoring import Scorer
from cl_bench.experiment.snapshot import RunState
from cl_bench.experiment.stage import Stage
from cl_bench.experiment.trainers import (
    TrainerFactory,
    as_interrupt,
    quiet_lightning,
    seed_training,
)
from cl_bench.learners import BaseLearner
from cl_bench.parallel.ranks import decided, rank, world
from cl_bench.parallel.sharding import whole
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
        self.record = record
        self.progress = progress
        self.state = state or RunState(learner, strategy, observer, record, None)
        self.interrupts = interrupts or Interrupts()
        self._scorer = Scorer(learner, settings.num_workers, self._test)
        learner.strategy = learner.acting = strategy
        learner.equip(strategy)
        schedule = settings.schedule
        self.learner.schedule = None if isinstance(schedule, Plateau | Cosine) else schedule

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
        how = (s.batch_size, seed, task.index, s.pack, s.num_workers, least)
        data = TrainLoader(stage.data, *how, needs=self.strategy.needs)
        plateau, validation = None, None
        if isinstance(s.schedule, Plateau) and not stage.index and stage.epochs != 0:
            require_validation(task)
            plateau = BestEpoch(s.schedule, self.learner, self.strategy)
            validation = EvalLoader(
                task.validation, s.validation_batch_size, mixed=self.learner.mixed(task)
            )
        checkpoints = TaskCheckpoints(self.state, task.index, stage, data, self.interrupts, plateau)
        hooks = TaskHooks(self, task, plan, stage, data, checkpoints, plateau, layers)
        with quiet_lightning(), as_interrupt():
            apart = (rank(),) if rank() else ()
            seed_training(derive_seed(seed, "training", task.index, *apart))
            epochs = {} if stage.epochs is None else {"max_epochs": stage.epochs}
            trainer = without_signals(self.trainer(callbacks=[hooks], **epochs))
            trainer.fit(self.learner, data, validation)
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
            without_signals(self.trainer(callbacks=[])).test(self.learner, loaders, verbose=False)


class TaskHooks(Callback):
    """Carries the strategy's hooks to where Lightning calls, and numbers to the record.

    Attributes:
        phases: of the task, once its own training is over.
        resumed_later: the stage in which a resumed run goes on, where it is not this one.
    """

    def __init__(
        self,
        engine: LightningEngine,
        task: Task,
        plan: Plan,
        stage: Stage,
        loader: TrainLoader,
        checkpoints: TaskCheckpoints,
        plateau: BestEpoch | None,
        layers: dict[str, dict[str, float]],
    ) -> None:
        self.engine = engine
        self.task = task
        self.plan = plan
        self.stage = stage
        self.loader = loader
        self.checkpoints = checkpoints
        self.plateau = plateau
        self.layers = layers
        self.phases: Sequence[Phase] = ()
        self.resumed_later: Stage | None = None
        self._epoch_started = 0.0
        observer = engine.observer if not stage.index else None
        self._watching = observer if observer and observer.watches_steps else None
        self._rate = 0.0
        self._freed: Parameter | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before the optimizer and any wrapper exist."""
        learner, schedule = self.engine.learner, self.engine.settings.schedule
        packs = self.loader.packs
        learner.schedule_interval = "step" if isinstance(schedule, Cosine) else "epoch"
        if isinstance(schedule, Cosine):
            learner.schedule = lambda optimizer: schedule.over(packs.planned(trainer))(optimizer)
        if self.stage.phase is not None:
            learner.enter(self.stage.phase, again=self.stage.resumed is not None)
            self.checkpoints.set_up(trainer, self.stage.resumed)
            return
        learner.begin(self.task, self.engine.strategy, self.plan.start)
        inside = self.engine.state.resume_task()
        if inside is not None and inside.get("stage"):  # older checkpoints know no stages
            phases = self.engine.strategy.phases(learner, self.task)
            self.resumed_later = Stage.of_checkpoint(phases, inside)
            trainer.fit_loop.max_epochs = 0
        else:
            self.checkpoints.set_up(trainer, inside)
        if world() > 1 and not any(p.requires_grad for p in learner.parameters()):
            self._freed = next(learner.parameters())  # DDP wraps nothing that is wholly frozen
            self._freed.requires_grad_(True)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The optimizer exists, if anything is trained."""
        if self._freed is not None:
            self._freed.requires_grad_(False)
        if self.resumed_later is not None:
            return
        self.checkpoints.load_training(trainer)
        if trainer.max_epochs == 0:  # Lightning has nothing to start or to end then
            self._before_task()
            self.engine.progress.task(self.task.index, 0)
            self._end(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Weights are on their device and nothing has moved yet."""
        self._stand(trainer)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
        if not self.checkpoints.resumed:
            self._before_task()
        steps = self.loader.packs.steps * int(trainer.max_epochs or 1)
        self.engine.progress.task(self.task.index, steps, before=self.checkpoints.batches)
        self._epoch_started = time.perf_counter()
        self._rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.checkpoints.begin()

    def _before_task(self) -> None:
        if self.engine.observer and not self.stage.index:
            with self.engine.learner.work.paused(), self.engine.learner.put_together():
                self.engine.observer.before_task(self.engine.learner, self.task)

    def _stand(self, trainer: Trainer) -> None:
        epochs, planned = int(trainer.max_epochs or 1), self.loader.packs.planned(trainer)
        phase = self.stage.phase.name if self.stage.phase else None
        self.engine.learner.stand(phase, trainer.current_epoch, epochs, planned)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Time the epoch."""
        self._stand(trainer)
        self._epoch_started = time.perf_counter()
        self._rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.checkpoints.epoch_begins(trainer)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Tell the display, which decides by the clock whether to look, and the checkpoints."""
        self.engine.progress.advance(self.loader.packs.batches_in(batch_idx))
        if self._watching:
            step, learner = trainer.global_step, self.engine.learner
            with learner.work.paused(), learner.put_together():
                self._watching.after_step(learner, self.task, step, self._rate)
        self.checkpoints.learned(trainer, batch_idx + 1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the epoch and do what the strategy decides about the rate."""
        learner = self.engine.learner
        epoch, epochs = trainer.current_epoch + 1, int(trainer.max_epochs or 1)
        loss = learner.epoch_loss()
        validation = {} if self.plateau is None else {"validation_loss": learner.validation_loss()}
        self.engine.record.epoch(
            task=self.task.index,
            epoch=epoch,
            train_loss=loss,
            learning_rate=self._rate,
            seconds=time.perf_counter() - self._epoch_started,
            steps=self.loader.packs.steps,
            phase=self.stage.phase.name if self.stage.phase else None,
            **validation,
        )
        self.engine.progress.epoch(epoch, epochs, loss)
        self.loader.packs.end_epoch(trainer)
        out_of_patience = None
        if self.plateau is not None:
            out_of_patience = self._lower_rate(trainer, validation["validation_loss"])
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        progress = Progress(epoch, epochs, loss, rate, out_of_patience)
        decision = learner.acting.after_epoch(learner, self.task, progress)
        if decision is None:
            return
        if decision.rebuild_optimizer:
            rebuild_optimizer(trainer)
        for optimizer in trainer.optimizers:
            set_rates(optimizer, decision.reset_rate, decision.scale_rate)
        trainer.should_stop = trainer.should_stop or decision.stop

    def _lower_rate(self, trainer: Trainer, loss: float) -> bool:
        """Follow the plateau; whether the rate was lowered, and the task goes on."""
        assert self.plateau is not None
        if not self.plateau.after_epoch(loss):
            return False
        for optimizer in trainer.optimizers:
            set_rates(optimizer, False, self.plateau.settings.factor)
        if trainer.optimizers[0].param_groups[0]["lr"] < self.plateau.settings.min_rate:
            trainer.should_stop = True
            return False
        return True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Weights are final and still on their device."""
        if self.plateau is not None:
            self.plateau.restore()
        self.engine.learner.require_finite()
        self._end(trainer)

    def _end(self, trainer: Trainer) -> None:
        """Prepare the next phase, or consolidate after the last."""
        learner, strategy = self.engine.learner, self.engine.strategy
        learner.leave()
        self.phases = strategy.phases(learner, self.task)
        if self.stage.index < len(self.phases):
            prepare = self.phases[self.stage.index].prepare
            if prepare is not None:
                prepare(learner)
            return
        with implicit_replication():  # a part of a weight may meet what all hold alike
            strategy.consolidate(learner, self.task, strategy.collect(learner, self.task))
            strategy.release(learner)
        if world() > 1:  # eigenvectors need not be the same to the last bit
            state = whole(strategy.state_dict())
            strategy.load_state_dict(decided(lambda: state))
        learner.equip(strategy)
        self.layers.update({name: dict(values) for name, values in strategy.metrics().items()})
        if self.engine.observer:
            with learner.work.paused(), learner.put_together():
                watched = self.engine.observer.after_task(learner, self.task)
            for name, values in watched.items():
                self.layers.setdefault(name, {}).update(values)
