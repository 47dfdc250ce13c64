"""Checkpoints between tasks and inside one, and going on from one."""

from lightning import Trainer

from cl_bench.contracts import State
from cl_bench.experiment.interrupts import Interrupts
from cl_bench.experiment.loader import TrainLoader
from cl_bench.experiment.plateau import BestEpoch
from cl_bench.experiment.snapshot import RunState, set_random_states
from cl_bench.experiment.stage import Stage
from cl_bench.parallel.ranks import world
from cl_bench.parallel.sharding import collected, load_optimizer, optimizer_state
from cl_bench.parallel.stored import resolved

ASK_EVERY = 16
"""Steps after which processes that train together ask each other for signals."""


def keep_between(state: RunState, interrupts: Interrupts, task: int) -> None:
    """Before the task with index ``task``: write a checkpoint, and end if a signal came."""
    state.save_between(task)
    interrupts.agree()
    interrupts.stop()


class TaskCheckpoints:
    """Saves a task between optimizer steps, and puts one that was saved back into a Trainer.

    Always at the same steps, however often the run is resumed; and when a signal asks for it. Not
    a callback itself, since Lightning spends time on each of those in every step.

    Args:
        state: of the run.
        task: index of the task.
        stage: of the task.
        loader: its training data.
        interrupts: signals that wait for a checkpoint.
        plateau: follows the validation loss; None where nothing does.

    Attributes:
        resumed: the part of a checkpoint from inside the stage, until training goes on from it.
        batches: learned in the stage so far.
        rate: of the first parameter group when the epoch began.
    """

    def __init__(
        self,
        state: RunState,
        task: int,
        stage: Stage,
        loader: TrainLoader,
        interrupts: Interrupts,
        plateau: BestEpoch | None = None,
    ) -> None:
        self.state = state
        self.task = task
        self.stage = stage
        self.loader = loader
        self.interrupts = interrupts
        self.plateau = plateau
        self.resumed: State | None = None
        self.batches = 0
        self.rate = 0.0
        self._every = self._due = float("inf")

    def set_up(self, trainer: Trainer, resumed: State | None) -> None:
        """Before there is an optimizer.

        Args:
            trainer: of the stage.
            resumed: the part of a checkpoint from inside the stage, whose weights are loaded; None
                where it begins now.
        """
        self._every = self.state.every_steps * trainer.accumulate_grad_batches
        self.resumed = resumed
        if self.resumed:
            self.batches = self.resumed["batches"]
            self.loader.resume_at(self.resumed["epoch"], self.resumed["position"])
        self._plan()

    def load_training(self, trainer: Trainer) -> None:
        """Once optimizers exist and before a loop begins: load both."""
        if self.resumed is None:
            return
        for optimizer, state in zip(trainer.optimizers, self.resumed["optimizers"], strict=True):
            load_optimizer(optimizer, state)
        # Older checkpoints do not hold it: what it has become since, where it follows steps.
        now = trainer.optimizers[0].param_groups[0]["lr"]
        self.rate = self.resumed.get("rate", now)
        configs = trainer.lr_scheduler_configs
        for config, state in zip(configs, self.resumed["schedulers"], strict=True):
            config.scheduler.load_state_dict(state)
        trainer.precision_plugin.load_state_dict(self.resumed["precision"])
        trainer.fit_loop.load_state_dict(self.resumed["loops"])
        if self.plateau:
            best = resolved(self.resumed["plateau"], self.state.learner.mesh)
            self.plateau.load_state_dict(best)

    def begin(self) -> None:
        """The last thing before the first step: random states."""
        if self.resumed is not None:
            set_random_states(self.resumed["random"])
            self.resumed = None

    def epoch_begins(self, trainer: Trainer) -> None:
        """What was due at the end of the last epoch is done here, where the epoch is recorded."""
        self.rate = trainer.optimizers[0].param_groups[0]["lr"]
        if self.batches and self._wanted:
            self._save(trainer, position=0)

    def learned(self, trainer: Trainer, position: int) -> None:
        """Save if it is time, no gradient is being accumulated, and the epoch goes on.

        Args:
            trainer: of the task.
            position: items of the loader that are learned in this epoch.
        """
        self.batches += self.loader.packs.batches_in(position - 1)
        if not self._wanted:
            return
        steps_now = position % trainer.accumulate_grad_batches == 0
        if steps_now and position < trainer.num_training_batches:
            self._save(trainer, position)

    @property
    def _wanted(self) -> bool:
        if self.batches >= self._due:
            return True
        if world() > 1:  # all of them must save at the same step
            return self.batches % ASK_EVERY == 0 and self.interrupts.agree()
        return self.interrupts.requested is not None

    def _plan(self) -> None:
        self._due = (self.batches // self._every + 1) * self._every

    def _save(self, trainer: Trainer, position: int) -> None:
        loops = trainer.fit_loop.state_dict()
        if position == 0:
            # Lightning zeroes these on entering an epoch, which it takes for entered on resuming.
            progress = loops["epoch_loop.batch_progress"]
            progress["current"] = dict.fromkeys(progress["current"], 0)
            progress["is_last_batch"] = False
        training = {
            "stage": self.stage.index,
            "earlier": {"batches": self.stage.batches, "steps": self.stage.steps},
            "batches": self.batches,
            "epoch": trainer.current_epoch,
            "rate": self.rate,
            "position": position,
            "optimizers": [optimizer_state(optimizer) for optimizer in trainer.optimizers],
            "schedulers": [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs],
            "precision": trainer.precision_plugin.state_dict(),
            "loops": loops,
            "plateau": collected(self.plateau.state_dict()) if self.plateau else None,
        }
        step = (self.stage.batches + self.batches) // trainer.accumulate_grad_batches
        self.state.save_inside(self.task, step, training, scheduled=self.batches >= self._due)
        self._plan()
        self.interrupts.stop()
