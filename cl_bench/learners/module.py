"""The learner: where the strategy's hooks meet Lightning's.

Read :meth:`BaseLearner.training_step` and :meth:`BaseLearner.configure_optimizers` beside the loop
in ``docs/architecture.md``: they are its inner part.
"""

import weakref
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import lightning
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cl_bench.contracts import Batch, Loss, Phase, State, Strategy, Stream, Task, UsageError
from cl_bench.contracts.plan import Start
from cl_bench.contracts.strategy import overrides, penalises_weights
from cl_bench.learners.evaluation import Evaluation
from cl_bench.learners.optimizing import Optimizing
from cl_bench.learners.shared import SharedServices
from cl_bench.learners.stages import Stages
from cl_bench.learners.window import Window
from cl_bench.learners.work import Work
from cl_bench.optimizers import OptimizerFactory, place_of_factory
from cl_bench.packed import learn_pack
from cl_bench.parallel import sharding
from cl_bench.parallel.clipping import clip_by_norm
from cl_bench.parallel.ranks import average_, world

ScheduleFactory = Callable[[Optimizer], LRScheduler]


def trainer_of(learner: lightning.LightningModule) -> lightning.Trainer | None:
    """The Trainer that learns or tests it, or did last; None where there never was one."""
    try:
        return learner.trainer
    except RuntimeError:
        return None


class BaseLearner(Stages, Evaluation, SharedServices, Optimizing, lightning.LightningModule):
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
    need_company: Sequence[str] = ()
    """Layers that cannot take the statistics of a batch of one sample."""

    def __init__(
        self, stream: Stream, optimizer: OptimizerFactory, batch_size: int, seed: int, pack: int
    ) -> None:
        super().__init__()
        self.scenario = stream.scenario
        self.task_id_at_test = stream.task_id_at_test
        self.modality = stream.modality
        self._first_data = lambda: stream[0].train
        self.batch_size = batch_size
        self.seed = seed
        self.pack = pack
        self.automatic_optimization = pack == 1
        self.strategy = self.acting = Strategy()
        self.own_objective: Callable[..., Loss] | None = None
        self.phase: Phase | None = None
        self.schedule: ScheduleFactory | None = None
        self.schedule_interval: Literal["epoch", "step"] = "epoch"
        self.task: Task | None = None
        self.seen_heads = 0
        self.test_tasks: list[Task] = []
        self.work = Work()
        self._optimizer_factory = optimizer
        self._optimizer: weakref.ref[Optimizer] | None = None
        self.held_norms: set[nn.Module] = set()
        self._held: set[Tensor] = set()
        self._extras: dict[int, nn.ModuleDict] = {}
        self._before_phase = None
        self._begin_counting()
        self._window = Window()

    # -- what a kind of learner defines ---------------------------------------------------------

    @abstractmethod
    def forward(self, batch: Batch, head: int | None = None) -> Tensor:
        """Outputs for a batch."""

    @abstractmethod
    def label_logits(self, out: Tensor, batch: Batch) -> Tensor:
        """Logit of every sample's own label."""

    @abstractmethod
    def draw_labels(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch with labels drawn from the model's own predictions."""

    def representation(self, hidden: Tensor, batch: Batch, name: str) -> Tensor:
        """One vector (n, d) for every sample from what the block called ``name`` puts out."""
        return hidden.flatten(1)

    def predictions(self, out: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits and labels of all terms of the loss.

        Raises:
            UsageError: the learner reads no text.
        """
        raise UsageError("only a language model's loss is made of tokens: use learner=language")

    def own_answers(self, batch: Batch, temperature: float, generator: torch.Generator) -> Batch:
        """The model's own answers to prompts.

        Raises:
            UsageError: the learner reads no text.
        """
        raise UsageError("only a language model answers prompts: use learner=language")

    def tokens(self, batch: Batch) -> Tensor:
        """How many tokens each sample has, int64 (n,).

        Raises:
            UsageError: the learner reads no text.
        """
        raise UsageError("batch_tokens=...: only text has tokens; use batch_size=...")

    def longest(self) -> AbstractContextManager[None]:
        """Inside, a batch is read as long as the stream makes it."""
        return nullcontext()

    @property
    def recomputes(self) -> bool:
        """Whether activations are computed again in the backward pass."""
        return False

    def describe(self) -> str:
        """The network in words: two networks with the same description compute the same."""
        return repr(self)

    # -- a task -----------------------------------------------------------------------------------

    def begin(self, task: Task, strategy: Strategy, start: Start = "current") -> None:
        """Meet a task: everything that an earlier task or strategy froze is free again."""
        self._optimizer = None
        self._due = self._carried
        super().begin(task, strategy, start)

    def leave(self) -> None:
        """A stage is over; the task's own hands on what the optimizer knows."""
        if self.phase is None:
            self._hand_on(self._optimizing())
        super().leave()

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
        constrain = partial(self.acting.constrain, self)
        learn_pack(batch, optimizer, following, self._learn, constrain, self._watch)
        return None

    @property
    def _accumulated(self) -> int:
        """Batches of one optimizer step."""
        trainer = trainer_of(self)
        return 1 if trainer is None else trainer.accumulate_grad_batches

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Gradients are synchronised, unscaled, accumulated and not yet clipped."""
        if world() > 1:  # what a strategy has added lies outside the wrapped network
            own = {id(p) for p in self.parameters() if not self.sharded or sharding.is_part(p)}
            alike = [g for g in optimizer.param_groups if sharding.OWNED not in g]
            for parameter in (p for group in alike for p in group["params"]):
                if id(parameter) not in own and parameter.grad is not None:
                    average_(parameter.grad)
        if self._accumulated > 1:
            self._window.settle(optimizer, self._accumulated)
        self.acting.constrain(self)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """As the Trainer does; by our own norm where its own knows too little of gradients.

        That is where processes hold parts of them, and where a fused optimizer could take loss
        scaling into its step, which the Trainer will not clip, though here nothing is scaled.
        """
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        by_norm = gradient_clip_algorithm != "value"
        if gradient_clip_val and by_norm and (self.sharded or (fused and not scaled)):
            clip_by_norm(optimizer, gradient_clip_val)
        else:
            super().configure_gradient_clipping(
                optimizer, gradient_clip_val, gradient_clip_algorithm
            )

    def configure_optimizers(self) -> Any:
        """A fresh optimizer on the strategy's parameter groups, and a schedule of its rate."""
        groups = self._groups()
        trainer = trainer_of(self)
        if trainer is not None and trainer.max_epochs == 0:
            return None
        if not groups:
            raise UsageError(
                "nothing is left to train: the strategy froze every parameter; freeze less"
            )
        optimizer = self.make_optimizer(groups)
        if self.phase is None:
            self._take_over(optimizer)
        self._optimizer = weakref.ref(optimizer)
        for group in optimizer.param_groups:
            group["lr"] *= self.task.rate if self.task else 1.0
            on_cpu = all(parameter.device.type == "cpu" for parameter in group["params"])
            if on_cpu and group.get("foreach", False) is None:
                group["foreach"] = False  # what torch decides for a CPU too, but in every step
        optimizer.register_step_post_hook(self._count_step)
        if overrides(self.acting, "after_step"):
            optimizer.register_step_post_hook(self._stepped)
        if self.schedule is None:
            return optimizer
        following = {"scheduler": self.schedule(optimizer), "interval": self.schedule_interval}
        return {"optimizer": optimizer, "lr_scheduler": following}

    def _groups(self) -> list[dict[str, Any]]:
        groups = self.phase.groups(self) if self.phase else self.strategy.param_groups(self)
        found = [{**group, "params": list(group["params"])} for group in groups]
        return [group for group in found if group["params"] or sharding.OWNED in group]

    def _optimizing(self) -> Sequence[Optimizer]:
        optimizer = None if self._optimizer is None else self._optimizer()
        return () if optimizer is None else (optimizer,)

    def __getstate__(self) -> dict[str, Any]:
        """As of any LightningModule; the optimizer is of the original's weights alone."""
        return {**super().__getstate__(), "_optimizer": None}

    def _stepped(self, *_: Any) -> None:
        self.acting.after_step(self, self._step.batch, self._step.out)

    def progress_state(self) -> State:
        """What a checkpoint needs beside the weights: steps, heads, and losses not yet reported."""
        return {
            "seen_heads": self.seen_heads,
            "work": self.work.counts(),
            **self._carried_state(),
            **self._losses_state(),
        }

    def load_progress_state(self, state: State) -> None:
        """Inverse of :meth:`progress_state`."""
        self.seen_heads, self.work = state["seen_heads"], Work(**state["work"])
        self._carried = state.get("optimizer")
        self._load_losses_state(state)

    def train(self, mode: bool = True) -> "BaseLearner":
        """As usual, except that held normalisation layers keep their statistics."""
        super().train(mode)
        for norm in self.held_norms:
            norm.eval()
        return self

    def _left_behind(self) -> dict[int, Any]:
        empty: list[Any] = [self.held_norms, self.test_tasks, self._losses, self._terms]
        empty += [self.work, self._step, self._window]
        return {
            **super()._left_behind(),
            **{id(value): type(value)() for value in empty},
            id(self.strategy): Strategy(),
            id(self.schedule): None,
            id(self.on_losses): None,
            id(self._optimizer_factory): None,
            id(self._first_data): None,
            id(self._carried): None,
            id(self._due): None,
            id(self.task): self.task,
        }

    # -- what strategies and loaders ask --------------------------------------------------------

    @property
    def least_batch(self) -> int:
        """2 where a batch of one sample cannot be learned, or means something else."""
        return 2 if self.need_company else super().least_batch

    def configure_model(self) -> None:
        """What :meth:`shard` does, before Lightning comes to ask for it."""

    def example(self) -> Batch:
        """A sample of the stream's first task, as the network takes it."""
        found: Batch = self._first_data()[torch.tensor([0])]  # type: ignore[no-untyped-call]
        return found

    @property
    def network(self) -> nn.Module:
        """The module whose layers strategies see."""
        return self

    @property
    def body(self) -> nn.Module:
        """The network without its heads."""
        return self.backbone

    @property
    def projectable(self) -> Literal["input", "gradient", "step"]:
        """The cheapest place at which projecting keeps the *weight change* in the subspace.

        At the inputs, where gradients are enough and the loss reaches the weights through the
        forward pass alone.
        """
        if self.at_task != "reset" or self._place() == "step":
            return "step"
        shared = len(list(self.named_parameters(remove_duplicate=False))) > len(
            list(self.named_parameters())
        )
        trainer = trainer_of(self)
        half = trainer is not None and not str(trainer.precision).startswith(("32", "64"))
        half |= self.rounding is not None
        apart = not (shared or half or self.sharded or penalises_weights(self.strategy))
        apart = apart and self.own_objective is None
        return "input" if apart else "gradient"

    def _place(self) -> Literal["gradient", "step"]:
        return place_of_factory(self.make_optimizer, self._groups(), self.parameters())
