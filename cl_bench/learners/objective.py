"""What is minimised: loss terms, their means over epochs and validation data, divergence."""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from cl_bench.contracts import Batch, Loss, State, Strategy, Task, UsageError
from cl_bench.contracts.learner import Position
from cl_bench.contracts.loss import Count, some
from cl_bench.learners.network import NetworkServices
from cl_bench.learners.work import Work
from cl_bench.parallel.batch_norm import part_of_a_batch
from cl_bench.parallel.ranks import average_, is_idle, share, world

LOSS_WINDOW = 64
"""Losses are looked at this many at a time: a look at each would stall an accelerator."""


class DivergedError(UsageError):
    """The loss is NaN or infinite: the run stops, what it has recorded stays."""


class Seen:
    """What the latest step, validation and test saw; a module's own attributes are slow to set.

    Attributes:
        batch: that was learned.
        out: for it, detached.
        terms: of its loss.
        validation: the loss of the pass so far.
        loader: whose data is tested; None between tests.
        inside: the strategy's ``inference`` for it.
    """

    batch: Batch
    out: Tensor
    terms: Count
    validation: Loss
    phase: str | None = None
    epoch = epochs = step = steps = 0

    def __init__(self) -> None:
        self.inside = ExitStack()
        self.loader: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy is in the middle of no test."""
        return {**vars(self), "inside": ExitStack(), "loader": None}


def _samples(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _counts(terms: Sequence[Count]) -> Tensor:
    """int64 (n,), float64 where terms have weights."""
    where = next((count.device for count in terms if isinstance(count, Tensor)), None)
    if where is None:
        weighted = any(isinstance(count, float) for count in terms)
        return torch.tensor(terms, dtype=torch.float64 if weighted else torch.int64)
    return torch.stack([torch.as_tensor(count, device=where) for count in terms])


class Objective(NetworkServices):
    """Mixin: the loss of a batch, and the means that epochs report.

    Attributes:
        acting: the strategy whose hooks are called while something is trained.
        own_objective: replaces the loss, if anything does.
        task: that is learned; None before any.
        batch_size: samples of one optimizer step.
        learned_steps: batches learned of the task whose losses were looked at.
        loss_window: so many of them are looked at together.
        on_losses: is told how many that are now, and the latest ones' mean loss.
        work: what the network was made to compute.
    """

    acting: Strategy
    own_objective: Callable[..., Loss] | None
    task: Task | None
    batch_size: int
    learned_steps: int
    work: Work
    loss_window: int = LOSS_WINDOW
    on_losses: Callable[[int, float], None] | None = None

    def _begin_counting(self) -> None:
        """To be called once, by the constructor."""
        self.learned_steps = 0
        self._losses: list[Tensor] = []
        self._terms: list[Count] = []
        self._loss_sum, self._loss_count = 0.0, 0.0
        self._step = Seen()

    @property
    def _accumulated(self) -> int:
        """Batches of one optimizer step."""
        return 1

    def outputs(self, batch: Batch) -> Tensor:
        """What the loss is taken of; a kind of learner may leave out what no loss looks at."""
        out: Tensor = self(batch)
        return out

    @abstractmethod
    def loss(self, out: Tensor, batch: Batch) -> Tensor:
        """Mean loss over the batch."""

    def terms(self, batch: Batch) -> Count:
        """How many terms the mean of :meth:`loss` has: samples, or labelled tokens.

        Where that is counted on a device, a tensor (): training waits for no answer.
        """
        return _samples(batch)

    def loss_terms(self, batch: Batch) -> int:
        """The same as a number."""
        return int(self.terms(batch))

    def total_loss(self, out: Tensor, batch: Batch) -> Loss:
        """The loss as what may be added up over batches, in double precision."""
        terms = self.loss_terms(batch)
        return Loss(self.loss(out, batch).double() * terms, terms)

    def total_objective(self, out: Tensor, batch: Batch) -> Loss:
        """What is minimised but for penalties, as what may be added up over batches."""
        if self.own_objective is None:
            return self.total_loss(out, batch)
        return self.own_objective(self, batch, out)

    def step_loss(self, batch: Batch) -> tuple[Tensor, Count]:
        """What a batch's gradient is taken of, a mean, and over how many terms it goes.

        For engines that step by themselves.
        """
        loss = self._learn(batch)
        return loss, self._step.terms

    def mean_loss(self, whole: Batch) -> tuple[Tensor, Count]:
        """The loss of all outputs for a batch that all processes hold, by parts; and its terms.

        The mean over processes of what each makes of its part is the mean over the batch.
        """
        batch, out, idle = self._own_outputs(whole, self)
        return self._own_loss(whole, batch, out, idle)

    @staticmethod
    def _own_outputs(
        whole: Batch, outputs: Callable[[Batch], Tensor]
    ) -> tuple[Batch, Tensor, bool]:
        """Own part of a batch, the outputs for it, and whether it counts nothing."""
        batch = share(whole)
        if batch is whole:
            return batch, outputs(batch), False
        idle = is_idle(whole)
        with part_of_a_batch(_samples(whole) / _samples(batch), counts=not idle):
            return batch, outputs(batch), idle

    def _own_loss(
        self, whole: Batch, batch: Batch, out: Tensor, idle: bool
    ) -> tuple[Tensor, Count]:
        if batch is whole:
            return self.loss(out, batch), self.terms(batch)
        part, terms = 0 if idle else self.loss_terms(batch), self.loss_terms(whole)
        return self.loss(out, batch) * (world() * part / some(terms)), terms

    def _learn(self, batch: Batch) -> Tensor:
        whole = self.acting.on_batch(self, batch)  # type: ignore[arg-type]
        self.work.both(_samples(whole))
        batch, out, idle = self._own_outputs(whole, self.outputs)
        if self.own_objective is not None:
            own = self.own_objective(self, batch, out)
            loss, terms = self._own_mean(own, batch is not whole, idle)
        else:
            loss, terms = self._own_loss(whole, batch, out, idle)
        penalty = self.acting.penalty(self, batch, out)  # type: ignore[arg-type]
        self._step.batch, self._step.out, self._step.terms = batch, out.detach(), terms
        return loss if penalty is None else loss + penalty

    @staticmethod
    def _own_mean(found: Loss, apart: bool, idle: bool) -> tuple[Tensor, Count]:
        """The mean of an objective, and its terms, in which other processes have a part."""
        if not apart:
            return found.mean, found.count
        own = torch.as_tensor(found.count, dtype=torch.float64, device=found.sum.device)
        terms = average_(own * (not idle)) * world()
        return found.sum * ((not idle) * world() / some(terms)), terms

    def _watch(self, loss: Tensor) -> None:
        self._losses.append(loss.detach())
        self._terms.append(self._step.terms)
        if len(self._losses) >= self.loss_window:
            self.flush_losses()

    def flush_losses(self) -> None:
        """Take the pending losses into the epoch's mean.

        Raises:
            DivergedError: one of them is not finite.
        """
        if not self._losses:
            return
        losses = average_(torch.stack(self._losses).double())
        finite = losses.isfinite()
        if not bool(finite.all()):
            step = self.learned_steps + int(finite.logical_not().nonzero()[0])
            value = losses[~finite][0].item()
            raise self._diverged(f"the loss became {value}", f" at step {step}")
        terms = _counts(self._terms).to(losses)
        self.learned_steps += len(self._losses)
        total, count = float((losses * terms).sum()), float(terms.sum())
        self._loss_sum, self._loss_count = self._loss_sum + total, self._loss_count + count
        if self.on_losses is not None:
            self.on_losses(self.learned_steps, total / (count or 1.0))
        self._losses.clear()
        self._terms.clear()

    def epoch_facts(self) -> dict[str, float]:
        """What else is to be told of the batches since the last call."""
        return {}

    def epoch_loss(self) -> float:
        """Mean training loss since the last call, over samples or labelled tokens."""
        self.flush_losses()
        mean = self._loss_sum / (self._loss_count or 1.0)
        self._loss_sum, self._loss_count = 0.0, 0.0
        return mean

    @property
    def progress(self) -> Position:
        """Where training stands."""
        now = self._step
        return Position(now.phase, now.epoch, now.step, now.steps, now.epochs)

    def stand(self, phase: str | None, epoch: int, epochs: int, steps: int) -> None:
        """Engines say here where training stands; steps are counted, from 0 in every phase.

        Args:
            phase: of the task; None is the main one.
            epoch: that begins, from 0.
            epochs: of the phase, at most.
            steps: optimizer steps planned for them.
        """
        now = self._step
        if phase != now.phase:
            now.phase, now.step = phase, 0
        now.epoch, now.epochs, now.steps = epoch, epochs, steps

    def _count_step(self, *_: object) -> None:
        """Hook of the optimizer."""
        self._step.step += 1

    def _losses_state(self) -> State:
        """Steps taken, and losses not yet reported."""
        if world() > 1:
            self.flush_losses()  # each process has losses of its own
        return {
            "learned_steps": self.learned_steps,
            "position": {"phase": self._step.phase, "step": self._step.step},
            "losses": torch.stack(self._losses) if self._losses else None,
            "terms": _counts(self._terms),
            "loss_sum": self._loss_sum,
            "loss_count": self._loss_count,
        }

    def _load_losses_state(self, state: State) -> None:
        self.learned_steps = state["learned_steps"]
        self._losses = [] if state["losses"] is None else list(state["losses"].unbind())
        alike = 1 if "terms" in state else self.batch_size  # older checkpoints count batches
        self._terms = state["terms"].tolist() if "terms" in state else [alike] * len(self._losses)
        self._loss_sum, self._loss_count = state["loss_sum"] * alike, state["loss_count"] * alike
        batches = self.learned_steps + len(self._losses)
        older = {"phase": None, "step": batches // self._accumulated}
        vars(self._step).update(state.get("position", older))

    def on_validation_epoch_start(self) -> None:
        """A loss of its own for every pass over the validation data."""
        where = next(self.network.parameters()).device
        self._step.validation = Loss(torch.zeros((), dtype=torch.float64, device=where), 0)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch's loss, without the strategy's penalty."""
        self._step.validation += self.total_objective(self.outputs(batch), batch)

    def validation_loss(self) -> float:
        """Mean loss over the validation data, in the latest pass.

        Raises:
            DivergedError: it is not finite.
        """
        mean = float(average_(self._step.validation.mean))
        if not math.isfinite(mean):
            raise self._diverged(f"the validation loss became {mean}")
        return mean

    def _diverged(self, what: str, where: str = "") -> DivergedError:
        when = f"in task {self.task.name!r}" if self.task else "before any training"
        return DivergedError(
            f"{what} {when}{where}; lower the learning rate (optimizer.lr=...) or clip "
            "gradients (pack=1 trainer.gradient_clip_val=1.0); results so far are kept"
        )
