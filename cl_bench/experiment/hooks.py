"""Where Lightning calls a strategy's hooks, in one stage of a task."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch.distributed.tensor.experimental import implicit_replication
from torch.nn import Parameter

from cl_bench.contracts import Phase, Plan, Progress, Strategy, Task
from cl_bench.experiment.loader import TrainLoader
from cl_bench.experiment.loop import LoopSettings
from cl_bench.experiment.observer import Observer
from cl_bench.experiment.plateau import BestEpoch, PerStep
from cl_bench.experiment.rates import rebuild_optimizer, set_rates
from cl_bench.experiment.resuming import TaskCheckpoints
from cl_bench.experiment.snapshot import RunState
from cl_bench.experiment.stage import Stage
from cl_bench.learners import BaseLearner
from cl_bench.parallel.ranks import world
from cl_bench.parallel.sharding import agreed
from cl_bench.tracking import ProgressDisplay, Record


@dataclass(frozen=True)
class Parts:
    """What all stages of a run share.

    Attributes:
        learner: what learns.
        strategy: which updates are allowed.
        settings: seed, batch size, packing, schedule.
        observer: watches the run from the side; None means nobody does.
        record: keeps the numbers of every epoch.
        progress: shows where training stands.
        state: of the run, with its checkpoints.
    """

    learner: BaseLearner
    strategy: Strategy
    settings: LoopSettings
    observer: Observer | None
    record: Record
    progress: ProgressDisplay
    state: RunState


class TaskHooks(Callback):
    """Carries the strategy's hooks to where Lightning calls, and numbers to the record.

    Attributes:
        phases: of the task, once its own training is over.
        resumed_later: the stage in which a resumed run goes on, where it is not this one.
    """

    def __init__(
        self,
        parts: Parts,
        task: Task,
        plan: Plan,
        stage: Stage,
        loader: TrainLoader,
        checkpoints: TaskCheckpoints,
        plateau: BestEpoch | None,
        layers: dict[str, dict[str, float]],
    ) -> None:
        self.parts = parts
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
        observer = parts.observer if not stage.index else None
        self._watching = observer if observer and observer.watches_steps else None
        self._freed: Parameter | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before the optimizer and any wrapper exist."""
        learner, schedule = self.parts.learner, self.parts.settings.schedule
        packs, log_steps = self.loader.packs, self.parts.settings.log_steps
        if log_steps is not None:
            learner.loss_window = log_steps
            learner.on_losses = partial(self._log_losses, trainer)
        learner.schedule_interval = "step" if isinstance(schedule, PerStep) else "epoch"
        if isinstance(schedule, PerStep):
            learner.schedule = lambda optimizer: schedule.over(packs.planned(trainer))(optimizer)
        if self.stage.phase is not None:
            learner.enter(self.stage.phase, again=self.stage.resumed is not None)
            self.checkpoints.set_up(trainer, self.stage.resumed)
            return
        learner.begin(self.task, self.parts.strategy, self.plan.start)
        inside = self.parts.state.resume_task()
        if inside is not None and inside.get("stage"):  # older checkpoints know no stages
            phases = self.parts.strategy.phases(learner, self.task)
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
            self.parts.progress.task(self.task.index, 0)
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
        self.parts.progress.task(self.task.index, steps, before=self.checkpoints.batches)
        self._epoch_started = time.perf_counter()
        self.checkpoints.begin()

    def _before_task(self) -> None:
        if self.parts.observer and not self.stage.index:
            with self.parts.learner.work.paused(), self.parts.learner.put_together():
                self.parts.observer.before_task(self.parts.learner, self.task)

    def _stand(self, trainer: Trainer) -> None:
        epochs, planned = int(trainer.max_epochs or 1), self.loader.packs.planned(trainer)
        phase = self.stage.phase.name if self.stage.phase else None
        self.parts.learner.stand(phase, trainer.current_epoch, epochs, planned)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Time the epoch."""
        self._stand(trainer)
        self._epoch_started = time.perf_counter()
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
        self.parts.progress.advance(self.loader.packs.batches_in(batch_idx))
        if self._watching:
            step, learner = trainer.global_step, self.parts.learner
            with learner.work.paused(), learner.put_together():
                self._watching.after_step(learner, self.task, step, self.checkpoints.rate)
        self.checkpoints.learned(trainer, batch_idx + 1)

    def _log_losses(self, trainer: Trainer, batches: int, loss: float) -> None:
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        phase = self.stage.phase.name if self.stage.phase else None
        self.parts.record.steps(self.task.index, batches, loss, rate, phase)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the epoch and do what the strategy decides about the rate."""
        learner = self.parts.learner
        epoch, epochs = trainer.current_epoch + 1, int(trainer.max_epochs or 1)
        loss = learner.epoch_loss()
        validation = {} if self.plateau is None else {"validation_loss": learner.validation_loss()}
        self.parts.record.epoch(
            task=self.task.index,
            epoch=epoch,
            train_loss=loss,
            learning_rate=self.checkpoints.rate,
            seconds=time.perf_counter() - self._epoch_started,
            steps=self.loader.packs.steps,
            phase=self.stage.phase.name if self.stage.phase else None,
            **validation,
            **learner.epoch_facts(),
        )
        self.parts.progress.epoch(epoch, epochs, loss)
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
        self.parts.learner.require_finite()
        self._end(trainer)

    def _end(self, trainer: Trainer) -> None:
        """Prepare the next phase, or consolidate after the last."""
        learner, strategy = self.parts.learner, self.parts.strategy
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
            strategy.load_state_dict(agreed(strategy.state_dict()))
        learner.equip(strategy)
        self.layers.update({name: dict(values) for name, values in strategy.metrics().items()})
        if self.parts.observer:
            with learner.work.paused(), learner.put_together():
                watched = self.parts.observer.after_task(learner, self.task)
            for name, values in watched.items():
                self.layers.setdefault(name, {}).update(values)
