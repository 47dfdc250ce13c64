"""One task of a strategy inside somebody else's loop, from setup to release."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from cl_bench.contracts import Batch, Plan, Progress, Strategy, UsageError
from cl_bench.contracts.strategy import overrides
from cl_bench.integrations.borrowed import Borrowed
from cl_bench.integrations.groups import decide, regroup
from cl_bench.integrations.lines import LINES, Lesson, require_classes
from cl_bench.integrations.outputs import is_text
from cl_bench.integrations.sample import Met, SampledTask
from cl_bench.integrations.stepping import Stepping
from cl_bench.parallel.ranks import decided, gathered, is_idle, share, world


class Session(Stepping):
    """Sets the strategy up, calls it around optimizer steps, and takes it off again.

    Args:
        strategy: which updates are allowed.
        learner: the network.
        task: what is known of the task.
        constrain: whether gradients are ready when ``optimizer.step`` is called, or once its
            closure has returned; if not, the owner calls :meth:`constrain`.
        met: the tasks so far, this one included.
        epochs: that the loop is going to train.
        steps: optimizer steps of all of them.

    Attributes:
        steps: optimizer steps seen.
        called: names of the hooks that the loop has called in this stage.
    """

    def __init__(
        self,
        strategy: Strategy,
        learner: Borrowed,
        task: SampledTask,
        constrain: bool,
        met: Met,
        epochs: int | None = None,
        steps: int | None = None,
    ) -> None:
        self.strategy = strategy
        self.learner = learner
        self.task = task
        self.met = met
        self.epochs, self.planned = epochs, steps
        self.steps = 0
        self.epoch = 0
        self.called: set[str] = set()
        self.needed: set[str] = set()
        self.batch: Batch = {}
        self.out = torch.empty(0)
        self.lines = LINES
        self.trains, self.regroups = True, False
        self.origin: list[int] | None = None  # of groups that an epoch's end has made
        self.lesson: Lesson
        self._constrain_before = constrain
        self._attached: dict[Optimizer, list[Any]] = {}
        self._added: set[int] = set()
        self._idle = self._checked = self._set_up = self._left_out = False
        self.stepping = False
        self._evaluations = 0

    # -- from setup to release --------------------------------------------------------------------

    def begin(self) -> Lesson:
        """Set the strategy up; if that fails, nothing stays changed."""
        learner = self.learner
        learner.open()
        before = {id(p) for p in learner.parameters()}
        try:
            if is_text(self.task.batch):
                require_classes(self.strategy)
                learner.modality = "text"
            self.strategy.check(learner)
            learner.announce(self.strategy)
            plan = self.strategy.plan(self.met, self.task.index)  # type: ignore[arg-type]
            if plan is None:
                self._left_out = True
                plan = Plan(self.task.train, epochs=0)
            self._set_up = True
            learner.begin(self.task, self.strategy, plan.start)
        except BaseException:
            self.end()
            raise
        learner.clear_frozen()
        lesson = Lesson(self, plan, self.epochs)
        self.epochs = lesson.epochs
        self.stand(None, self.epochs, self.planned)
        self._need()
        added = any(id(p) not in before for p in learner.trainable_parameters())
        self.regroups = overrides(self.strategy, "param_groups")
        if added or self.regroups:
            self.needed.add("param_groups")
        if plan.data is not self.task.train:
            self.needed.add("plan")
        self.trains = self.epochs != 0
        return lesson

    def stand(self, phase: str | None, epochs: int | None, steps: int | None) -> None:
        """How long a stage goes on, as far as that is known."""
        self.epochs = self.epochs if phase else epochs
        self.learner.stand(phase, 0, epochs or 0, steps or 0)

    def _need(self) -> None:
        """What a stage's first step must have been through."""
        acting = self.learner.acting
        self.called, self._checked = set(), False
        self.needed = {h for h in ("on_batch", "penalty") if overrides(acting, h)}
        if self.learner.own_objective is not None:
            self.needed.add("objective")

    def consolidate(self) -> None:
        """The task is learned: take it into the strategy's memory, if that does not leave it out.

        Raises:
            UsageError: a line that the strategy needs after the first step was left out.
        """
        strategy, learner = self.strategy, self.learner
        if self._left_out:
            return
        if overrides(strategy, "after_epoch") and not self.epoch and self.trains:
            raise self._missing(["after_epoch"])
        if self.phase_count():
            raise self._missing(["phases"])
        learner._step.batch = {name: value[:2] for name, value in self.task.batch.items()}
        learner.require_finite()
        strategy.consolidate(learner, self.task, strategy.collect(learner, self.task))
        self.release()
        if world() > 1:  # eigenvectors need not be the same to the last bit
            state = strategy.state_dict()
            strategy.load_state_dict(decided(lambda: state))
        learner.equip(strategy)

    def phase_count(self) -> int:
        """Phases that the task asks for and that the loop has not trained."""
        if "phases" in self.called:
            return 0
        return len(self.strategy.phases(self.learner, self.task))

    def phases(self) -> Iterator[Any]:
        """The task's phases, each entered before it is given and left behind it."""
        learner = self.learner
        for phase in self.strategy.phases(learner, self.task):
            if phase.prepare is not None:
                phase.prepare(learner)
            learner.enter(phase)
            learner.clear_frozen()
            self.stand(phase.name, phase.epochs, None)
            self._need()
            self.needed.add("param_groups")
            yield phase
            if not self._checked:
                raise UsageError(f"phase {phase.name!r} took no optimizer step: train it")
            learner.leave()
        self.called.add("phases")

    def release(self) -> None:
        """The strategy gives the network back, once."""
        if self._set_up:
            self._set_up = False
            self.strategy.release(self.learner)

    def end(self) -> None:
        """Leave the network and its optimizers as they were found, but for what was learned."""
        for handles in self._attached.values():
            for handle in handles:
                handle.remove()
        self._attached.clear()
        try:
            if self.learner.phase is not None:
                self.learner.leave()
            self.release()
        finally:
            self.learner.end()

    # -- what the loop calls ----------------------------------------------------------------------

    def param_groups(self) -> list[dict[str, Any]]:
        """Groups for the optimizer of the stage that is trained, as the strategy has them."""
        self.called.add("param_groups")
        phase, learner = self.learner.phase, self.learner
        groups = phase.groups(learner) if phase else self.strategy.param_groups(learner)
        found = [{**group, "params": list(group["params"])} for group in groups]
        self._added |= {id(p) for group in found for p in group["params"]}
        return [group for group in found if group["params"]]

    def on_batch(self, batch: Batch) -> Batch:
        """What is learned in place of the loop's batch, or this process's part of it."""
        self.called.add("on_batch")
        batch = self.complete(batch)
        self._idle = False
        if not overrides(self.learner.acting, "on_batch"):
            self.batch = batch
            return batch
        for name, wanted in (("plain", "plain_view"), ("index", "sample_index")):
            if getattr(self.strategy.needs, wanted) and name not in batch:
                raise UsageError(
                    f"{type(self.strategy).__name__} asks for {name!r} in every batch ("
                    + (
                        "its x without augmentation; x itself, where there is none)"
                        if name == "plain"
                        else "each sample's position in the training data, int64)"
                    )
                    + f': guard.on_batch({{"x": x, "y": y, "{name}": ...}})'
                )
        if world() > 1:  # a strategy sees whole batches
            parts = gathered(batch)
            batch = {
                k: torch.cat([part[k].to(v.device) for part in parts]) for k, v in batch.items()
            }
        whole = self.learner.acting.on_batch(self.learner, batch)
        self._idle = is_idle(whole)
        self.batch = share(whole)
        return self.batch

    def complete(self, batch: Batch) -> Batch:
        """The batch with its task, where that is known at test time."""
        if self.learner.scenario == "task" and "task" not in batch:
            first = next(iter(batch.values()))
            task = torch.full((len(first),), self.task.index, device=first.device)
            return {**batch, "task": task}
        return batch

    def objective(self, batch: Batch, out: Tensor) -> Tensor:
        """What is minimised, but for penalties: a mean over the batch."""
        self.called.add("objective")
        batch, out = self._take(batch, out)
        if self.learner.own_objective is None:
            return self.learner.loss(out, batch)
        found = self.learner.own_objective(self.learner, batch, out)
        apart = world() > 1
        return self.learner._own_mean(found, apart, self._idle)[0]

    def penalty(self, batch: Batch, out: Tensor) -> Tensor:
        """What joins the loss; 0 where nothing does."""
        self.called.add("penalty")
        batch, out = self._take(batch, out)
        found = self.learner.acting.penalty(self.learner, batch, out)
        return out.new_zeros(()) if found is None else found

    def _take(self, batch: Batch, out: Tensor) -> tuple[Batch, Tensor]:
        if "on_batch" in self.needed - self.called:
            raise self._missing(["on_batch"])
        batch = self.complete(batch)
        out = self.learner.shown(out, batch)
        self.batch, self.out = batch, out.detach()
        return batch, out

    def after_epoch(self, train_loss: float) -> bool:
        """An epoch is over; whether the task is, too."""
        self.epoch += 1
        if not overrides(self.learner.acting, "after_epoch"):
            return False
        if self.epochs is None:
            raise UsageError("say how many epochs the task may take: guard.task(..., epochs=5)")
        optimizers = list(self._attached)
        if not optimizers:
            raise UsageError("guard.after_epoch() is for the end of an epoch: no step was taken")
        progress = Progress(self.epoch, self.epochs, train_loss, self.rate, None)
        found = self.learner.acting.after_epoch(self.learner, self.task, progress)
        if found is None:
            return False
        if found.rebuild_optimizer:
            self.origin = self.regroup(optimizers[-1])
        decide(optimizers, found)
        return found.stop

    @property
    def rate(self) -> float:
        """Of the optimizer that was attached last, in its first group."""
        optimizers = list(self._attached)
        return float(optimizers[-1].param_groups[0]["lr"]) if optimizers else float("nan")

    def regroup(self, optimizer: Optimizer) -> list[int]:
        """Give an optimizer the strategy's groups, each with the options that it had before.

        Returns:
            For every group, which of the old ones its options are of.
        """
        own = {id(p) for p in self.learner.parameters()} | self._added
        return regroup(optimizer, self.param_groups(), own)

    def _missing(self, hooks: list[str]) -> UsageError:
        lines = "; ".join(self.lines[hook] for hook in hooks)
        return UsageError(f"{type(self.strategy).__name__} needs what the loop leaves out: {lines}")
