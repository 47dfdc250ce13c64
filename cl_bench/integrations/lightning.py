"""A strategy around the training of somebody's LightningModule, which stays as it is."""

from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.optim import Optimizer

from cl_bench.contracts import Strategy, UsageError
from cl_bench.integrations.borrowed import Borrowed, Forward, Loss
from cl_bench.integrations.sample import Sample, SampledTask
from cl_bench.integrations.session import Session, require_served
from cl_bench.learners.guards import refuse_half_precision


class ContinualCallback(Callback):
    """Guards one task; give every task's Trainer one of its own, with the same strategy.

    The strategy sees gradients accumulated and not yet clipped, and weights just after each step;
    ``after_step`` gets no batch and no outputs. The task is remembered when training ends, from
    the weights as they then are: list the callback after others that swap weights there (SWA).

    Args:
        strategy: which updates are allowed; the same object for all tasks.
        sample: some of the task's training data: ``x``, ``(x, y)`` or tensors by name.
        task: position of the task, from 0.
        loss: mean loss from outputs and labels, for strategies that take gradients themselves.
        forward: how the module is called on a batch; ``module(batch["x"])`` if None.
        seed: for samples that the strategy draws.

    Raises:
        UsageError: the strategy needs what somebody's module cannot give, or the sample is no
            sample.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        sample: Sample,
        task: int,
        loss: Loss | None = None,
        forward: Forward | None = None,
        seed: int = 0,
    ) -> None:
        require_served(strategy)
        self.strategy = strategy
        self.task = SampledTask(sample, task)
        self._loss = loss
        self._forward = forward
        self._seed = seed
        self._session: Session | None = None
        self._done = False
        self._resumed = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before the optimizer exists.

        Raises:
            UsageError: this task is done, or the Trainer does not fit the strategy.
        """
        if stage != "fit":
            return
        if self._done:
            raise UsageError(
                f"task {self.task.index} is learned: make a ContinualCallback for the next one"
            )
        self._check(trainer)
        learner = Borrowed(pl_module, self._loss, self._forward, self._seed)
        refuse_half_precision(self.strategy, learner, str(trainer.precision))
        session = Session(self.strategy, learner, self.task, constrain=False)
        session.begin()
        self._session = session

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The module is on its device: see that it takes the sample."""
        if self._session:
            self._session.learner.accepts(self.task.batch)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch every optimizer.

        Raises:
            UsageError: the checkpoint that was resumed had learned this task already.
        """
        if self._done:
            raise UsageError(
                f"this checkpoint has learned task {self.task.index} already, and would be guarded "
                f"against itself: go on with ContinualCallback(..., task={self.task.index + 1})"
            )
        for optimizer in trainer.optimizers:
            if self._session:
                self._session.attach(optimizer)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Gradients are unscaled, accumulated and not yet clipped."""
        if self._session:
            self._session.attach(optimizer)  # one that was rebuilt meanwhile
            self._session.constrain()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Weights are final and still on their device.

        Raises:
            UsageError: the task took no step.
        """
        self._finish()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where a resumed task has no step left, Lightning neither starts nor ends training.

        Raises:
            UsageError: the task took no step.
        """
        self._finish()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the module back; the task is not remembered."""
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module back, however training ended."""
        if stage == "fit":
            self._release()

    def state_dict(self) -> dict[str, Any]:
        """The strategy's memory, and which task it is at."""
        return {
            "task": self.task.index,
            "done": self._done,
            "strategy": self.strategy.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint of this task, to resume it, or of the finished task before it.

        Raises:
            UsageError: the checkpoint is of another task, or of one that was not finished.
        """
        task, done = state_dict["task"], state_dict["done"]
        resumed = task == self.task.index
        if not resumed and not (done and task == self.task.index - 1):
            raise UsageError(
                f"this checkpoint was written in task {task} "
                f"{'after' if done else 'before'} its end, and task {self.task.index} cannot go on "
                "from it: take one that trainer.save_checkpoint wrote after the task before"
            )
        self._resumed, self._done = resumed, resumed and done
        if self._session is None:
            self.strategy.load_state_dict(state_dict["strategy"])
            return
        # Setup ran before there was a memory to set up from.
        self._session.end()
        self.strategy.load_state_dict(state_dict["strategy"])
        self._session.begin()
        self.strategy.load_state_dict(state_dict["strategy"])

    def _check(self, trainer: Trainer) -> None:
        alone = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
        if trainer.world_size > 1 or not alone:
            raise UsageError(
                f"{type(trainer.strategy).__name__} with {trainer.world_size} processes: this "
                "version guards training on one device, Trainer(devices=1)"
            )
        if (
            self.strategy.needs.rewrites_gradients
            and trainer.gradient_clip_val
            and trainer.gradient_clip_algorithm == "value"
        ):
            raise UsageError(
                "gradient_clip_algorithm='value' bends gradients after they were constrained: use "
                "gradient_clip_algorithm='norm'"
            )

    def _finish(self) -> None:
        if self._session and not self._done:
            if self._session.steps == 0 and not self._resumed:
                raise UsageError(
                    f"task {self.task.index} took no optimizer step, so there is nothing to "
                    "remember: give it data, and more max_epochs than a checkpoint that it goes on "
                    "from has counted already"
                )
            self._session.consolidate()
            self._done = True
        self._release()

    def _release(self) -> None:
        session, self._session = self._session, None
        if session:
            session.end()
