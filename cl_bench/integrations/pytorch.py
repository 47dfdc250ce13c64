"""A strategy around a plain PyTorch training loop, which stays as it is."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cl_bench.contracts import Batch, Phase, Scenario, Strategy, Task, UsageError
from cl_bench.contracts.strategy import overrides, penalises_weights
from cl_bench.integrations.borrowed import Borrowed
from cl_bench.integrations.lines import Lesson, require_served
from cl_bench.integrations.outputs import Forward, LossFunction
from cl_bench.integrations.report import Loaders, Report
from cl_bench.integrations.sample import Met, Sample, SampledTask, as_batch
from cl_bench.integrations.saving import Saved
from cl_bench.integrations.session import Session
from cl_bench.integrations.watching import check_optimizers, only_through
from cl_bench.optimizers import place_of


class Guarded(Saved):
    """A model whose updates a strategy guards, one task after another.

    Each task's training loop goes inside :meth:`task`. The strategy sees gradients just before
    ``optimizer.step()`` (after clipping, accumulation and unscaling) and weights just after it.
    Which further lines a strategy needs, if any, it says at the end of the first step.

    Args:
        model: the network, before ``torch.compile`` and ``DistributedDataParallel``.
        strategy: which updates are allowed.
        loss: mean loss from outputs and labels, for strategies that take gradients themselves.
        forward: how the model is called on a batch; ``model(batch["x"])`` if None.
        seed: for samples that the strategy draws.
        heads: names (shell patterns) of the output layers, in the order of the tasks or of their
            classes: for strategies that tell heads from other layers or read features.
        scenario: ``domain`` (all tasks share their classes), ``class`` (each brings some, and the
            task is not known at test time) or ``task`` (it is); None: ``class`` if there are
            several heads, else ``domain``.
        inputs: samples of a step, a promise that the loss reaches the guarded weights through their
            layers' forward passes alone (no penalty of the loop's own on them). Under plain SGD,
            wide layers may then project what they read in place of their gradient, which costs a
            small part of it. None makes no such promise.
        num_tasks: that come in all, for strategies that ask: ``Joint(when="last")``.

    Attributes:
        tasks: tasks learned so far.

    Raises:
        UsageError: the strategy needs what a plain loop cannot give.
    """

    def __init__(
        self,
        model: nn.Module,
        strategy: Strategy,
        *,
        loss: LossFunction | None = None,
        forward: Forward | None = None,
        seed: int = 0,
        heads: Sequence[str] = (),
        scenario: Scenario | None = None,
        inputs: int | None = None,
        num_tasks: int | None = None,
    ) -> None:
        if num_tasks is not None and (type(num_tasks) is not int or num_tasks < 1):
            raise UsageError(f"num_tasks={num_tasks!r}: a whole number of at least 1, or None")
        if not isinstance(model, nn.Module):
            raise UsageError(f"model={model!r}: give a torch.nn.Module that is made already")
        require_served(strategy, heads, inputs is not None)
        self.learner = Borrowed(model, loss, forward, seed, heads, scenario)
        self.learner.strategy = self.learner.acting = strategy
        if overrides(strategy, "plan"):
            self.learner.remember_initial_state()
            self.learner._learnable = set()
        self.strategy = strategy
        self._inputs, self._num_tasks = inputs, num_tasks
        self.met: list[SampledTask] = []
        self.learner.task_id_at_test |= strategy.needs.task_id_at_test
        self.watching: Report | None = None
        self._session: Session | None = None

    @property
    def tasks(self) -> int:
        """Tasks learned so far."""
        return len(self.met)

    # -- a task -----------------------------------------------------------------------------------

    @contextmanager
    def task(
        self,
        *optimizers: Optimizer,
        sample: Sample,
        epochs: int | None = None,
        steps: int | None = None,
        classes: range | None = None,
        name: str | None = None,
    ) -> Iterator[Lesson]:
        """Around the training loop of the next task.

        On leaving, the strategy remembers the task by ``sample``. An exception inside leaves the
        strategy's memory as it was; the weights are what the loop has made of them.

        Args:
            *optimizers: every optimizer that moves the model's weights; fresh or carried over. None
                of them where it is built inside, from :meth:`param_groups`.
            sample: some of the task's training data: ``x``, ``(x, y)`` or tensors by name. All of
                it, for strategies that choose what is trained.
            epochs: that the loop trains, for strategies that ask.
            steps: optimizer steps of all epochs, likewise.
            classes: of the task, where tasks bring their own; None takes those of its head.
            name: of the task in reports.

        Raises:
            UsageError: an optimizer, the sample or the strategy does not fit the model; or the
                loop moved weights with an optimizer that was not given, took no step, or left out
                a line that the strategy needs.
        """
        session = self.opened(
            sample, epochs=epochs, steps=steps, classes=classes, name=name, optimizers=optimizers
        )
        try:
            with only_through(session, bool(optimizers), self._moves):
                for optimizer in optimizers:
                    session.attach(optimizer)
                yield session.lesson
            self.close()
        finally:
            self.release()

    def opened(
        self,
        sample: Sample,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        classes: range | None = None,
        name: str | None = None,
        optimizers: Sequence[Optimizer] = (),
        constrain: bool = True,
    ) -> Session:
        """Begin a task: for callbacks, who cannot enter :meth:`task`."""
        if self._session is not None:
            raise UsageError("a task is open already: leave its `with` block first")
        task = self._described(sample, classes, name)
        check_optimizers(optimizers, self._moves)
        self.learner.projectable = self._place(optimizers) if optimizers and constrain else "step"
        met = Met([*self.met, task], self._num_tasks)
        session = Session(self.strategy, self.learner, task, constrain, met, epochs, steps)
        session.lesson = session.begin()
        self._session = session
        if self.watching is not None:
            self.watching.before(task)
        return session

    def before(self, tasks: int) -> None:
        """So many tasks were learned before, of which only the strategy knows more."""
        nothing = torch.zeros(1)
        self.met = [SampledTask(nothing, t).bare() for t in range(tasks)]

    def _place(self, optimizers: Sequence[Optimizer]) -> Literal["input", "gradient", "step"]:
        """Where projecting keeps the weight change in its subspace."""
        learner = self.learner
        place = place_of(optimizers, learner.parameters())
        shared = len(list(learner.network.named_parameters(remove_duplicate=False))) > len(
            list(learner.named_parameters())
        )
        adds = penalises_weights(self.strategy) or overrides(self.strategy, "objective")
        if place == "step" or self._inputs is None or shared or adds:
            return place
        learner.batch_size = self._inputs
        return "input"

    def close(self, resumed: bool = False) -> None:
        """The task is learned, here or, if ``resumed``, before what it goes on from was saved.

        Raises:
            UsageError: it took no step.
        """
        session = self._open()
        if session.steps == 0 and session.trains and not resumed:
            raise UsageError(
                "no given optimizer took a step inside the task, so nothing was guarded: put "
                "the loop inside `with`, and give the optimizer that it steps"
            )
        session.consolidate()
        self.met.append(session.task if overrides(self.strategy, "plan") else session.task.bare())
        if self.watching is not None:
            self.watching.after(session.task)

    def release(self) -> None:
        """Give the model back; a task that was not closed is not remembered."""
        session, self._session = self._session, None
        if session is not None:
            session.end()

    def _open(self) -> Session:
        if self._session is None:
            raise UsageError("no task is open: call this inside `with guard.task(...)`")
        return self._session

    def _described(self, sample: Sample, classes: range | None, name: str | None) -> SampledTask:
        learner, t = self.learner, len(self.met)
        if self._num_tasks is not None and t >= self._num_tasks:
            raise UsageError(f"num_tasks={self._num_tasks}: this is task {t + 1}")
        batch = as_batch(sample)
        if learner.scenario == "task" and "task" not in batch:
            batch["task"] = torch.full((len(next(iter(batch.values()))),), t)
        out = learner.accepts(batch)
        several = len(learner.heads) > 1
        if several and t >= len(learner.heads):
            raise UsageError(
                f"heads: there are {len(learner.heads)}, and this is task {t + 1}: name one a task"
            )
        if classes is None and several:
            classes = range(sum(learner.sizes[:t]), sum(learner.sizes[: t + 1]))
        elif classes is None:
            if learner.scenario != "domain":
                raise UsageError(
                    f"scenario={learner.scenario!r}: say which classes the task has, for example "
                    "guard.task(..., classes=range(0, 10))"
                )
            classes = range(out.shape[-1]) if out.dim() > 1 else range(0)
        return SampledTask(batch, t, classes, t if several else 0, name)

    # -- lines that some strategies need -----------------------------------------------------------

    def param_groups(self) -> list[dict[str, Any]]:
        """Groups for the optimizer, inside a task or a phase: ``SGD(guard.param_groups())``."""
        return self._open().param_groups()

    def on_batch(self, batch: Sample) -> Batch:
        """What is learned in place of a batch, by name: ``x`` and ``y``, or the batch's own."""
        return self._open().on_batch(as_batch(batch))

    def objective(self, batch: Sample, out: Tensor) -> Tensor:
        """What is minimised, a mean over the batch: the strategy's, or the loss that was given."""
        return self._open().objective(as_batch(batch), out)

    def penalty(self, batch: Sample, out: Tensor) -> Tensor:
        """What joins the loss."""
        return self._open().penalty(as_batch(batch), out)

    def after_epoch(self, train_loss: float = float("nan")) -> bool:
        """An epoch is over; whether the task is, too."""
        session = self._open()
        stop = session.after_epoch(train_loss)
        if self.watching is not None and train_loss == train_loss:
            rate = session.rate
            self.watching.epoch(session.task, session.epoch, train_loss, rate, session.steps)
        return stop

    def phases(self) -> Iterator[Phase]:
        """Further stages of a task, each with ``data``, ``epochs`` and an optimizer of its own."""
        return self._open().phases()

    def predict(self, batch: Sample, task: int | None = None) -> Tensor:
        """What answers at test, without gradients and in evaluation mode.

        Args:
            batch: inputs, by name or as one tensor.
            task: whose data it is, from 0, where that is known.

        Raises:
            UsageError: the strategy needs to know the task, or there is no such task.
        """
        with torch.no_grad(), self.learner.evaluating(), self.answering(task) as known:
            named = self.learner._to_device(self.told(as_batch(batch), task))
            return self.strategy.predict(self.learner, named, known)

    @contextmanager
    def answering(self, task: int | None) -> Iterator[Task | None]:
        """Inside, the network answers for the task."""
        if task is None and (self.strategy.needs.task_id_at_test or self.learner.task_id_at_test):
            raise UsageError(
                f"{type(self.strategy).__name__} answers task by task: say whose data it is, "
                "guard.predict(x, task=0)"
            )
        known = [*self.met, *([] if self._session is None else [self._session.task])]
        if task is not None and not 0 <= task < len(known):
            raise UsageError(f"task={task}: {len(known)} tasks are known, counted from 0")
        found = None if task is None else known[task]
        with self.strategy.inference(self.learner, found):
            yield found

    def told(self, batch: Batch, task: int | None) -> Batch:
        """The batch with its task, where that is known."""
        if task is None or self.learner.scenario != "task" or "task" in batch:
            return batch
        first = next(iter(batch.values()))
        return {**batch, "task": torch.full((len(first),), task, device=first.device)}

    def report(
        self,
        loaders: Loaders,
        run_dir: Path | str | None = None,
        *,
        stream: str = "own_loop",
        alignment: bool = True,
        divergence: int = 0,
    ) -> Report:
        """A record of the loop, as of our runs: ``with guard.report(loaders):`` around the tasks.

        Args:
            loaders: of test data, one a task, perhaps by name.
            run_dir: where to; None takes ``runs/<stream>/<strategy>/<time>-seed<k>``.
            stream: what the tasks are called together.
            alignment: whether to measure what updates do to the subspaces of old inputs.
            divergence: test samples of the new task, and of each old one, of which to measure how
                far a task moves what the model says of them; 0 measures nothing.

        Raises:
            UsageError: there is no loader, the directory holds a run, the loss is not known, or
                ``divergence`` is no number of samples.
        """
        return Report(self, loaders, run_dir, stream, alignment, divergence)

    # -- optimizers -------------------------------------------------------------------------------

    def _moves(self, optimizer: Optimizer) -> bool:
        own = {id(p) for p in self.learner.parameters()}
        if self._session is not None:
            own |= self._session._added
        return any(id(p) in own for group in optimizer.param_groups for p in group["params"])
