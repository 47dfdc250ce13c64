"""A strategy around the training of somebody's LightningModule, which stays as it is."""

from collections.abc import Mapping
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.optim import Optimizer

from cl_bench.contracts import Batch, Strategy, UsageError
from cl_bench.contracts.strategy import overrides
from cl_bench.integrations.lines import require_own_data, require_served, require_trainer
from cl_bench.integrations.outputs import Forward, LossFunction
from cl_bench.integrations.pytorch import Guarded
from cl_bench.integrations.sample import Sample, as_batch
from cl_bench.integrations.session import Session
from cl_bench.learners.guards import refuse_half_precision


class ContinualCallback(Callback):
    """Guards one task; give every task's Trainer one of its own, with the same strategy.

    The strategy sees gradients accumulated and not yet clipped, and weights just after each step.
    Where it replays, adds to the loss or replaces it, ``training_step`` gets the replayed samples
    too, and what it returns is added to or replaced, by what ``self(x)`` said in it. The task is
    remembered when training ends, from the weights as they then are: list the callback after others
    that swap weights there (SWA).

    Args:
        strategy: which updates are allowed; the same object for all tasks. Or the module's
            :class:`Guarded`, which keeps what a strategy adds to the network, and reports.
        sample: some of the task's training data: ``x``, ``(x, y)`` or tensors by name.
        task: position of the task, from 0; a :class:`Guarded` counts them by itself.
        loss: mean loss from outputs and labels, for strategies that take gradients themselves.
        forward: how the module is called on a batch; ``module(batch["x"])`` if None.
        seed: for samples that the strategy draws.
        classes: of the task, where tasks bring their own.
        name: of the task in reports.

    Raises:
        UsageError: the strategy needs what somebody's module cannot give.
    """

    def __init__(
        self,
        strategy: Strategy | Guarded,
        *,
        sample: Sample,
        task: int | None = None,
        loss: LossFunction | None = None,
        forward: Forward | None = None,
        seed: int = 0,
        classes: range | None = None,
        name: str | None = None,
    ) -> None:
        self._guard = strategy if isinstance(strategy, Guarded) else None
        self.strategy = strategy.strategy if isinstance(strategy, Guarded) else strategy
        require_served(self.strategy, self._guard and self._guard.learner.heads)
        require_trainer(self.strategy)
        if self._guard is None and overrides(self.strategy, "modules"):
            raise UsageError(
                f"{type(self.strategy).__name__} keeps modules of its own from task to task: give "
                "ContinualCallback(Guarded(module, strategy), ...)"
            )
        if self._guard is None and task is None:
            raise UsageError("say which task it is: ContinualCallback(..., task=0)")
        self.index = task if task is not None else self._guard.tasks if self._guard else 0
        as_batch(sample)
        self._given = {"sample": sample, "classes": classes, "name": name}
        self._made = (loss, forward, seed)
        self._session: Session | None = None
        self._done = self._resumed = False
        self._wrapped: tuple[LightningModule, Any] | None = None
        self._said: list[Any] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before the optimizer exists.

        Raises:
            UsageError: this task is done, or the Trainer does not fit the strategy.
        """
        if stage != "fit":
            return
        if self._done:
            raise UsageError(
                f"task {self.index} is learned: make a ContinualCallback for the next one"
            )
        self._check(trainer)
        if self._guard is None:
            loss, forward, seed = self._made
            self._guard = Guarded(pl_module, self.strategy, loss=loss, forward=forward, seed=seed)
            self._guard.before(self.index)
        guard = self._guard
        if not any(guard.learner.network is module for module in pl_module.modules()):
            raise UsageError("the Guarded that was given guards another module than this one")
        refuse_half_precision(self.strategy, guard.learner, str(trainer.precision))
        epochs = trainer.max_epochs if (trainer.max_epochs or 0) > 0 else None
        # The module comes to its device later: the sample is tried there, in on_fit_start.
        self._session = guard.opened(**self._given, epochs=epochs, constrain=False)  # type: ignore[arg-type]
        try:
            require_own_data(self._session)
        except UsageError:
            self._release()
            raise
        hooks = ("on_batch", "objective", "penalty")
        if any(overrides(self.strategy, hook) for hook in hooks):
            if not pl_module.automatic_optimization:
                self._release()
                raise UsageError(
                    f"{type(self.strategy).__name__} changes batches or the loss, and the module "
                    "trains by manual optimization: call guard.on_batch, guard.objective and "
                    "guard.penalty in training_step, in a plain loop"
                )
            self._wrap(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Optimizers exist, and the module is on its device."""
        session = self._session
        if session is None:
            return
        if "param_groups" in session.needed:
            if len(trainer.optimizers) != 1:
                raise UsageError(
                    f"{type(self.strategy).__name__} brings parameter groups: use one optimizer, "
                    f"not {len(trainer.optimizers)}"
                )
            self._regrouped(trainer, session.regroup(trainer.optimizers[0]))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch every optimizer.

        Raises:
            UsageError: the checkpoint that was resumed had learned this task already.
        """
        if self._done:
            raise UsageError(
                f"this checkpoint has learned task {self.index} already, and would be guarded "
                f"against itself: go on with ContinualCallback(..., task={self.index + 1})"
            )
        if self._session:
            steps = trainer.estimated_stepping_batches
            planned = int(steps) if steps != float("inf") else None
            self._session.stand(None, self._session.epochs, planned)
            for optimizer in trainer.optimizers:
                self._session.attach(optimizer)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Gradients are unscaled, accumulated and not yet clipped."""
        if self._session:
            self._session.attach(optimizer)  # one that was rebuilt meanwhile
            self._session.constrain()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The strategy may change rates and groups, or stop."""
        if self._session:
            loss = trainer.callback_metrics.get("train_loss")
            value = float("nan") if loss is None else float(loss)
            stop = self._session.after_epoch(value)
            if self._session.origin is not None:
                self._regrouped(trainer, self._session.origin)
            trainer.should_stop = trainer.should_stop or stop

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
        return {"task": self.index, "done": self._done, "strategy": self.strategy.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint of this task, to resume it, or of the finished task before it.

        Raises:
            UsageError: the checkpoint is of another task, or of one that was not finished.
        """
        task, done = state_dict["task"], state_dict["done"]
        resumed = task == self.index
        if not resumed and not (done and task == self.index - 1):
            raise UsageError(
                f"this checkpoint was written in task {task} "
                f"{'after' if done else 'before'} its end, and task {self.index} cannot go on "
                "from it: take one that trainer.save_checkpoint wrote after the task before"
            )
        self._resumed, self._done = resumed, resumed and done
        session = self._session
        if session is None:
            self.strategy.load_state_dict(state_dict["strategy"])
            return
        # Setup ran before there was a memory to set up from.
        session.end()
        self.strategy.load_state_dict(state_dict["strategy"])
        session.begin()
        self.strategy.load_state_dict(state_dict["strategy"])

    def _check(self, trainer: Trainer) -> None:
        alone = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
        if not alone:
            raise UsageError(
                f"{type(trainer.strategy).__name__}: every process needs whole weights here, "
                "Trainer(devices=1) or Trainer(strategy='ddp')"
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

    def _wrap(self, module: LightningModule) -> None:
        """Have ``training_step`` learn what the strategy makes of batches and of the loss."""
        session, original = self._session, module.training_step
        assert session is not None
        handle = module.register_forward_hook(
            lambda _, given, out: self._said.append(getattr(out, "logits", out))
        )

        def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            self._said.clear()
            whole = session.on_batch(as_batch(batch))
            found = original(_like(batch, whole), *args, **kwargs)
            loss = found["loss"] if isinstance(found, Mapping) else found
            if not isinstance(loss, Tensor):
                return found
            if not self._said or not isinstance(self._said[0], Tensor):
                raise UsageError(
                    "training_step has not called self(x), so that what the module says of the "
                    "batch is not known: call the module itself in it, not a part"
                )
            if session.learner.own_objective is not None:
                loss = session.objective(whole, self._said[0])
            loss = loss + session.penalty(whole, self._said[0])
            return {**found, "loss": loss} if isinstance(found, Mapping) else loss

        module.training_step = training_step  # type: ignore[method-assign]
        self._wrapped = module, handle

    def _regrouped(self, trainer: Trainer, origin: list[int]) -> None:
        """Schedulers keep a list of what they know of each group."""
        if self._session:
            self._session.origin = None
        for config in trainer.lr_scheduler_configs:
            regroup_scheduler(config.scheduler, origin)

    def _finish(self) -> None:
        if self._session and not self._done:
            if self._session.steps == 0 and not self._resumed:
                raise UsageError(
                    f"task {self.index} took no optimizer step, so there is nothing to "
                    "remember: give it data, and more max_epochs than a checkpoint that it goes on "
                    "from has counted already"
                )
            assert self._guard is not None
            self._guard.close(resumed=self._resumed)
            self._done = True
        self._release()

    def _release(self) -> None:
        if self._wrapped is not None:
            module, handle = self._wrapped
            handle.remove()
            del module.__dict__["training_step"]
            self._wrapped = None
            self._said.clear()
        session, self._session = self._session, None
        if session and self._guard is not None:
            self._guard.release()


def regroup_scheduler(scheduler: Any, origin: list[int]) -> None:
    """Have a schedule know as many groups as its optimizer has now."""
    known = len(getattr(scheduler, "base_lrs", ()))
    for name, value in vars(scheduler).items():
        if isinstance(value, list) and len(value) == known and known:
            setattr(scheduler, name, [value[i] for i in origin])
    if known:  # groups may have brought rates of their own
        groups = scheduler.optimizer.param_groups
        scheduler.base_lrs = [group.get("initial_lr", group["lr"]) for group in groups]


def _like(batch: Any, whole: Batch) -> Any:
    """The batch in the form in which the module takes it."""
    if isinstance(batch, Tensor):
        return whole["x"]
    if isinstance(batch, Mapping):
        return {name: whole[name] for name in batch}
    return type(batch)((whole["x"], whole["y"]))
