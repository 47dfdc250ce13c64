"""The learner: where the strategy's hooks meet Lightning's.

Read :meth:`BaseLearner.training_step` and :meth:`BaseLearner.configure_optimizers` beside the loop
in ``docs/architecture.md``: they are its inner part.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import lightning
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric

from cl_bench.contracts import Batch, Loss, Protect, State, Strategy, Stream, Task, UsageError
from cl_bench.contracts.loss import Count, some
from cl_bench.contracts.strategy import overrides, penalises_weights
from cl_bench.learners.services import NetworkServices
from cl_bench.learners.window import Window
from cl_bench.learners.work import Work
from cl_bench.packed import learn_pack
from cl_bench.parallel import sharding
from cl_bench.parallel.batch_norm import part_of_a_batch
from cl_bench.parallel.ranks import average_, gathered, is_idle, share, world
from cl_bench.subspace import Accumulator, LinearMap, Moments

OptimizerFactory = Callable[[Iterable[dict[str, Any]]], Optimizer]

ScheduleFactory = Callable[[Optimizer], LRScheduler]

LOSS_WINDOW = 64
"""Losses are looked at this many at a time: a look at each would stall an accelerator."""


class DivergedError(UsageError):
    """The loss is NaN or infinite: the run stops, what it has recorded stays."""


class _Step:
    """What the latest step and validation saw; apart, as a module's attributes are slow to set."""

    batch: Batch
    out: Tensor
    terms: Count
    validation: Loss


def _samples(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _counts(terms: Sequence[Count]) -> Tensor:
    """int64 (n,)."""
    where = next((count.device for count in terms if isinstance(count, Tensor)), None)
    if where is None:
        return torch.tensor(terms, dtype=torch.int64)
    return torch.stack([torch.as_tensor(count, device=where) for count in terms])


class BaseLearner(NetworkServices, lightning.LightningModule):
    """Model, loss, score and optimizer factory, plus the services strategies stand on.

    Subclasses give :meth:`forward`, :meth:`loss`, :meth:`score` and :meth:`label_logits`.

    Args:
        stream: tells heads and scenario.
        optimizer: builds an optimizer from parameter groups; called afresh for every task.
        batch_size: samples of one optimizer step.
        seed: for samples that strategies draw.
        pack: batches that one ``training_step`` learns. 1 is Lightning's automatic optimization;
            more saves its overhead on small networks whose data lies in memory.
    """

    backbone: nn.Module
    heads: nn.ModuleList
    need_company: Sequence[str] = ()
    """Layers that cannot take the statistics of a batch of one sample."""

    def __init__(
        self, stream: Stream, optimizer: OptimizerFactory, batch_size: int, seed: int, pack: int
    ) -> None:
        super().__init__()
        self.scenario = stream.scenario
        self.task_id_at_test = stream.task_id_at_test
        self.modality = stream.modality
        self.batch_size = batch_size
        self.seed = seed
        self.pack = pack
        self.automatic_optimization = pack == 1
        self.strategy = Strategy()
        self.schedule: ScheduleFactory | None = None
        self.schedule_interval: Literal["epoch", "step"] = "epoch"
        self.task: Task | None = None
        self.seen_heads = 0
        self.test_tasks: list[Task] = []
        self.test_scores = nn.ModuleList()
        self.learned_steps = 0
        self.work = Work()
        self._optimizer_factory = optimizer
        self.held_norms: set[nn.Module] = set()
        self._held: set[Tensor] = set()
        self._losses: list[Tensor] = []
        self._terms: list[Count] = []
        self._loss_sum, self._loss_count = 0.0, 0
        self._step = _Step()
        self._window = Window()

    # -- what a kind of learner defines ---------------------------------------------------------

    @abstractmethod
    def forward(self, batch: Batch, head: int | None = None) -> Tensor:
        """Outputs for a batch."""

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
        """The loss as what may be added up over batches."""
        terms = self.loss_terms(batch)
        return Loss(self.loss(out, batch).double() * terms, terms)

    @abstractmethod
    def score(self, out: Tensor, batch: Batch) -> Tensor:
        """Score of every sample in [0, 1]; its mean is the task's entry in the matrix."""

    @abstractmethod
    def label_logits(self, out: Tensor, batch: Batch) -> Tensor:
        """Logit of every sample's own label."""

    @abstractmethod
    def draw_labels(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch with labels drawn from the model's own predictions."""

    def finite(self, out: Tensor, batch: Batch) -> Tensor:
        """Whether every sample's outputs say anything: bool (n,).

        What is left out is minus infinity on purpose; NaN, plus infinity and nothing but minus
        infinity are not.
        """
        return out.amax(-1).isfinite().reshape(len(out), -1).all(1)

    def details(self, out: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """Further scores of every sample (n,), recorded beside the matrix; NaN does not count."""
        return {}

    def representation(self, hidden: Tensor, batch: Batch, name: str) -> Tensor:
        """One vector (n, d) for every sample from what the block called ``name`` puts out."""
        return hidden.flatten(1)

    def describe(self) -> str:
        """The network in words: two networks with the same description compute the same."""
        return repr(self)

    def initial_state(self) -> Mapping[str, Tensor]:
        """Weights and buffers as they were at construction."""
        return self._initial

    def remember_initial_state(self) -> None:
        """To be called at the end of a subclass's constructor."""
        self._initial = {k: v.detach().clone() for k, v in self.state_dict().items()}
        self._learnable = {p for p in self.parameters() if p.requires_grad}

    # -- weights of which each process holds a part ------------------------------------------------

    def shard(self) -> None:
        """Share the weights out among the processes, for good.

        Raises:
            UsageError: they cannot be.
        """
        learnable = {name for name, p in self.named_parameters() if p in self._learnable}
        sharding.shard(self, self.blocks())
        if not hasattr(self, "config"):  # PEFT asks whatever has a device mesh for one
            self.config = {"model_type": "custom"}
        self._learnable = {p for name, p in self.named_parameters() if name in learnable}

    @property
    def sharded(self) -> bool:
        """Whether processes share the weights out."""
        return sharding.is_sharded(self)

    def configure_model(self) -> None:
        """What :meth:`shard` does, before Lightning comes to ask for it."""

    def put_together(self) -> AbstractContextManager[None]:
        """Inside, every process holds all weights, to read; all must enter and leave together."""
        return sharding.put_together(self)

    def weights(self) -> dict[str, Tensor]:
        """Weights and buffers, whole."""
        return sharding.whole(self.state_dict()) if self.sharded else self.state_dict()

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Inverse of :meth:`weights`."""
        if self.sharded:
            sharding.load_weights(self, weights)
        else:
            self.load_state_dict(weights)

    @property
    def least_batch(self) -> int:
        """2 where a batch of one sample cannot be learned, or means something else."""
        return 2 if self.need_company else super().least_batch

    # -- a task -----------------------------------------------------------------------------------

    def begin(self, task: Task, strategy: Strategy) -> None:
        """Meet a task: everything that an earlier task or strategy froze is free again."""
        self.task, self.strategy = task, strategy
        self.seen_heads = max(self.seen_heads, task.head + 1)
        self.learned_steps = 0
        self.held_norms.clear()
        self._held.clear()
        for parameter in self.parameters():
            parameter.requires_grad_(self.learns(parameter))
        self.train_heads("seen" if self.scenario == "class" else "current")
        strategy.setup(self, task)
        if self.sharded:
            sharding.agree(self)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """One step, or ``pack`` of them."""
        if self.automatic_optimization:
            loss = self._learn(batch)
            self._watch(loss)
            return loss if self._accumulated == 1 else self._window.weigh(loss, self._step.terms)
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, Optimizer)
        configs: Any = self.trainer.lr_scheduler_configs
        following = [c.scheduler for c in configs if c.interval == "step"]
        constrain = partial(self.strategy.constrain, self)
        learn_pack(batch, optimizer, following, self._learn, constrain, self._watch)
        return None

    @property
    def _accumulated(self) -> int:
        """Batches of one optimizer step."""
        return 1 if self._trainer is None else self._trainer.accumulate_grad_batches

    def objective(self, batch: Batch) -> tuple[Tensor, Count]:
        """What a batch's gradient is taken of, a mean, and over how many terms it goes.

        For engines that step by themselves.
        """
        loss = self._learn(batch)
        return loss, self._step.terms

    def _learn(self, batch: Batch) -> Tensor:
        whole = self.strategy.on_batch(self, batch)
        self.work.both(_samples(whole))
        batch = share(whole)
        if batch is whole:
            out = self(batch)
            loss, terms = self.loss(out, batch), self.terms(batch)
        else:
            idle = is_idle(whole)
            with part_of_a_batch(_samples(whole) / _samples(batch), counts=not idle):
                out = self(batch)
            # The mean over processes of what each makes of its part is the mean over the batch.
            part, terms = 0 if idle else self.loss_terms(batch), self.loss_terms(whole)
            loss = self.loss(out, batch) * (world() * part / some(terms))
        penalty = self.strategy.penalty(self, batch, out)
        self._step.batch, self._step.out, self._step.terms = batch, out.detach(), terms
        return loss if penalty is None else loss + penalty

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Gradients are synchronised, unscaled, accumulated and not yet clipped."""
        if world() > 1:  # what a strategy has added lies outside the wrapped network
            own = {id(p) for p in self.parameters() if not self.sharded or sharding.is_part(p)}
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                if id(parameter) not in own and parameter.grad is not None:
                    average_(parameter.grad)
        if self._accumulated > 1:
            self._window.settle(optimizer, self._accumulated)
        self.strategy.constrain(self)

    def configure_optimizers(self) -> Any:
        """A fresh optimizer on the strategy's parameter groups, and a schedule of its rate."""
        groups = self._groups()
        if not groups:
            raise UsageError(
                "nothing is left to train: the strategy froze every parameter; freeze less "
                "(for example strategy.n_blocks=1)"
            )
        optimizer = self._optimizer_factory(groups)
        for group in optimizer.param_groups:
            group["lr"] *= self.task.rate if self.task else 1.0
            on_cpu = all(parameter.device.type == "cpu" for parameter in group["params"])
            if on_cpu and group.get("foreach", False) is None:
                group["foreach"] = False  # what torch decides for a CPU too, but in every step
        if overrides(self.strategy, "after_step"):
            optimizer.register_step_post_hook(self._stepped)
        if self.schedule is None:
            return optimizer
        following = {"scheduler": self.schedule(optimizer), "interval": self.schedule_interval}
        return {"optimizer": optimizer, "lr_scheduler": following}

    def _groups(self) -> list[dict[str, Any]]:
        return [dict(g) for g in self.strategy.param_groups(self) if g["params"]]

    def _stepped(self, *_: Any) -> None:
        self.strategy.after_step(self, self._step.batch, self._step.out)

    def _watch(self, loss: Tensor) -> None:
        self._losses.append(loss.detach())
        self._terms.append(self._step.terms)
        if len(self._losses) == LOSS_WINDOW:
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
        self._loss_sum += float((losses * terms).sum())
        self._loss_count += int(terms.sum())
        self._losses.clear()
        self._terms.clear()

    def epoch_loss(self) -> float:
        """Mean training loss since the last call, over samples or labelled tokens."""
        self.flush_losses()
        mean = self._loss_sum / max(1, self._loss_count)
        self._loss_sum, self._loss_count = 0.0, 0
        return mean

    def progress_state(self) -> State:
        """What a checkpoint needs beside the weights: steps, heads, and losses not yet reported."""
        if world() > 1:
            self.flush_losses()  # each process has losses of its own
        return {
            "seen_heads": self.seen_heads,
            "learned_steps": self.learned_steps,
            "work": self.work.counts(),
            "losses": torch.stack(self._losses) if self._losses else None,
            "terms": _counts(self._terms),
            "loss_sum": self._loss_sum,
            "loss_count": self._loss_count,
        }

    def load_progress_state(self, state: State) -> None:
        """Inverse of :meth:`progress_state`."""
        self.seen_heads, self.learned_steps = state["seen_heads"], state["learned_steps"]
        self.work = Work(**state["work"])
        self._losses = [] if state["losses"] is None else list(state["losses"].unbind())
        alike = 1 if "terms" in state else self.batch_size  # older checkpoints count batches
        self._terms = state["terms"].tolist() if "terms" in state else [alike] * len(self._losses)
        self._loss_sum, self._loss_count = state["loss_sum"] * alike, state["loss_count"] * alike

    def train(self, mode: bool = True) -> "BaseLearner":
        """As usual, except that held normalisation layers keep their statistics."""
        super().train(mode)
        for norm in self.held_norms:
            norm.eval()
        return self

    # -- validation -------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """A loss of its own for every pass over the validation data."""
        self._step.validation = Loss(torch.zeros((), dtype=torch.float64, device=self.device), 0)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch's loss, without the strategy's penalty."""
        self._step.validation += self.total_loss(self(batch), batch)

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

    def mixed(self, task: Task) -> tuple[int, int] | None:
        """What the order of the task's evaluation data follows from, where a score depends on it.

        That is where layers normalise evaluation data by the batch: seed and task then, so that all
        evaluations of the task have the same batches.
        """
        return (self.seed, task.index) if self.by_batch else None

    # -- evaluation -------------------------------------------------------------------------------

    def expect_tests(self, tasks: Sequence[Task]) -> None:
        """The tasks whose test loaders the next ``trainer.test`` will bring, in order."""
        self.test_tasks = list(tasks)
        self.test_scores = nn.ModuleList(MeanMetric().set_dtype(torch.float64) for _ in tasks)
        self._sums: list[dict[str, Tensor]] = [{} for _ in tasks]

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Score a batch of the ``dataloader_idx``-th expected task; returns scores by sample."""
        task = self.test_tasks[dataloader_idx]
        with self.strategy.inference(self, task if self.task_id_at_test else None):
            out = self(batch)
            if not bool(self.finite(out, batch).all()):
                raise self._diverged(f"outputs for test data of task {task.name!r} are not finite")
            metric = self.test_scores[dataloader_idx]
            assert isinstance(metric, MeanMetric)
            score = self.score(out, batch)
            metric.update(score)
            sums = self._sums[dataloader_idx]
            for name, values in self.details(out, batch).items():
                known = values[~values.isnan()].double()
                seen = torch.stack([known.sum(), known.new_tensor(len(known))])
                sums[name] = sums[name] + seen if name in sums else seen
        return score

    def require_finite(self) -> None:
        """Before a strategy measures what was learned: the last step may have ruined it.

        Raises:
            DivergedError: outputs for the batch that was learned last are not finite.
        """
        batch = getattr(self._step, "batch", None)
        if batch is None:
            return
        batch = self._to_device(batch)
        with torch.no_grad(), self._evaluating():
            known = self.finite(self(batch), batch).all()
        if float(average_(known.float())) < 1:
            raise self._diverged("outputs for training data are not finite")

    def test_details(self) -> list[dict[str, float]]:
        """Means of :meth:`details` over the data of each expected task; NaN where none counted."""
        means = []
        for everyones in zip(*gathered(self._sums), strict=True):
            sums: dict[str, Tensor] = {}
            for one in everyones:
                for name, seen in one.items():
                    sums[name] = sums[name] + seen.cpu() if name in sums else seen.cpu()
            means.append({name: float(total / count) for name, (total, count) in sums.items()})
        return means

    def performance(self, batch: Batch) -> float:
        """Mean score over the batch at the current weights; no side effects."""
        batch = self._to_device(batch)
        with torch.no_grad(), self._evaluating():
            out = self(batch)
            return float(self.score(out, batch).where(self.finite(out, batch), math.nan).mean())

    # -- services for strategies that a bare network has no answer to ----------------------------

    @property
    def network(self) -> nn.Module:
        """The module whose layers strategies see."""
        return self

    @property
    def body(self) -> nn.Module:
        """The network without its heads."""
        return self.backbone

    def is_guarded_head(self, name: str, heads: str) -> bool | None:
        """Whether ``protect.heads`` guards this layer; None if it is no head."""
        if not name.startswith("heads."):
            return None
        return heads == "always" or (heads == "auto" and self.scenario != "task")

    def layers(self, protect: Protect) -> list[LinearMap]:
        """The linear maps that ``protect`` selects.

        Heads that together are one read the same features, those of tasks to come included.

        Raises:
            UsageError: it selects none.
        """
        found = super().layers(protect)
        heads = (
            [m for m in found if m.name.startswith("heads.")] if self.scenario == "class" else []
        )
        return [replace(m, reads=heads[0].name) if m in heads[1:] else m for m in found]

    def is_own_head(self, name: str) -> bool:
        """Whether the layer or parameter belongs to a head that came with a task."""
        return name.startswith("heads.") and self.scenario != "domain"

    def tap(
        self,
        layers: Sequence[LinearMap],
        batches: Iterable[Batch],
        into: Mapping[str, Accumulator] | None = None,
        dropout: bool = False,
    ) -> Mapping[str, Moments]:
        """Second moments of the layers' inputs over the batches, in evaluation mode."""
        batches = list(batches) if world() > 1 else batches
        apart = world() > 1 and into is None

        def counted() -> Iterator[Batch]:
            for batch in batches:
                self.work.batch(batch, backward=False)
                if not apart:
                    yield batch
                elif not is_idle(batch):
                    yield share(batch)

        moments = super().tap(layers, counted(), into, dropout)
        if apart:
            for inputs in dict.fromkeys(moments[layer.name] for layer in layers):
                inputs.all_reduce()
        return moments

    def gradients(
        self,
        batch: Batch,
        of: Literal["loss", "logits"] = "loss",
        per_sample: bool = False,
    ) -> dict[str, Tensor]:
        """Raw gradients of the trainable parameters at the current weights; no side effects."""
        self.work.batch(batch, backward=True)
        return super().gradients(batch, of, per_sample)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        with super()._evaluating(), self.put_together():
            yield

    def train_heads(self, which: Literal["current", "seen"]) -> None:
        """Which output heads take part in training, apart from what is held in them."""
        current = self.task.head if self.task else 0
        for i, head in enumerate(self.heads):
            wanted = i < self.seen_heads if which == "seen" else i == current
            for parameter in head.parameters():
                free = self.learns(parameter) and parameter not in self._held
                parameter.requires_grad_(wanted and free)

    def learns(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter learns unless a strategy freezes it: as it was at construction."""
        return parameter in self._learnable

    def _freeze(self, parameters: Iterable[Tensor]) -> None:
        for parameter in parameters:
            parameter.requires_grad_(False)
            self._held.add(parameter)

    def reset_weights(self) -> None:
        """Back to the weights of construction."""
        self.load_weights(self.initial_state())

    @property
    def projectable(self) -> Literal["input", "gradient", "step"]:
        """The cheapest place at which projecting keeps the *weight change* in the subspace.

        A projected gradient stays projected under plain SGD, also with momentum (the optimizer is
        fresh for every task) and clipping by norm; weight decay and adaptive rates lead out of it,
        whether the optimizer's own or a parameter group's.
        """
        made = self._optimizer_factory(
            self._groups() or [{"params": [nn.Parameter(torch.zeros(1))]}]
        )
        own = {id(p) for p in self.parameters()}
        if type(made) is not SGD or any(
            group["weight_decay"] != 0 and any(id(p) in own for p in group["params"])
            for group in made.param_groups
        ):
            return "step"
        shared = len(list(self.named_parameters(remove_duplicate=False))) > len(
            list(self.named_parameters())
        )
        half = self._trainer is not None and not str(self.trainer.precision).startswith(
            ("32", "64")
        )
        apart = not (shared or half or self.sharded or penalises_weights(self.strategy))
        return "input" if apart else "gradient"
