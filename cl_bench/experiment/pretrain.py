"""What comes before the first task, done once and shared by every run that would do the same.

The weights that pre-training leads to are kept in ``$CL_BENCH_CACHE`` under a hash of everything
they depend on: text, recipe, network, initial weights, seed and precision. They become the
learner's initial weights, so a strategy that starts tasks afresh starts them here.

Processes that train together each learn their part of every batch; process 0 alone reads and writes
the cache.
"""

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import lightning
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset

from cl_bench.contracts import Batch, Loss, Pretraining, UsageError, derive_seed
from cl_bench.data import alone, cached, digest, present
from cl_bench.experiment.interrupts import without_signals
from cl_bench.experiment.trainers import (
    TrainerFactory,
    as_interrupt,
    quiet_lightning,
    seed_training,
)
from cl_bench.learners import BaseLearner
from cl_bench.learners.window import Window
from cl_bench.parallel.clipping import clip_by_norm
from cl_bench.parallel.ranks import average_, decided, rank, world
from cl_bench.parallel.sharding import is_part
from cl_bench.tracking import ProgressDisplay

FORMAT = 1
"""Counts up whenever the same settings lead to other weights."""


@dataclass(frozen=True)
class Pretrained:
    """How a learner came by its initial weights.

    Attributes:
        identity: names them in the cache.
        fingerprint: hash of their values.
        from_cache: whether an earlier run had made them.
        steps: optimizer steps behind them.
        final_loss: mean training loss of the last steps; None if they came from the cache.
        seconds: what it took, waiting for another run included.
    """

    identity: str
    fingerprint: str
    from_cache: bool
    steps: int
    final_loss: float | None
    seconds: float


def pretrain(
    learner: BaseLearner,
    recipe: Pretraining,
    trainer: TrainerFactory,
    seed: int,
    progress: ProgressDisplay,
    after_step: Callable[[], None] = lambda: None,
) -> Pretrained:
    """Give the learner the weights that ``recipe`` leads to, from the cache if they are there.

    Of several runs that want the same weights one trains; the others wait for it.

    Args:
        learner: at its weights of construction.
        recipe: what is learned, and how.
        trainer: builds a ``lightning.Trainer``; its number of epochs does not matter here.
        seed: of initial weights, order and dropout.
        progress: shows where training stands.
        after_step: called after every step; may raise to end it all.

    Raises:
        UsageError: the loss is not finite.
    """
    began = time.perf_counter()
    final_loss: list[float] = []
    with quiet_lightning():
        precision = str(trainer(callbacks=[]).precision)

    def build() -> dict[str, Tensor]:
        hooks = _Hooks(recipe.steps, progress, after_step)
        _train(learner, recipe, trainer, seed, hooks)
        final_loss.append(hooks.loss)
        return {k: v.detach().cpu().clone() for k, v in learner.saved_weights().items()}

    name = _identity(learner, recipe, seed, precision)
    waiting = alone(f"pretrained-{name}", "each pre-train") if rank() == 0 else nullcontext()
    with waiting:
        weights, fingerprint = _kept_or_made(f"pretrained-{name}", build)
    learner.load_weights(_everywhere(weights, learner))
    learner.remember_initial_state()
    return Pretrained(
        name,
        fingerprint,
        not final_loss,
        recipe.steps,
        final_loss[0] if final_loss else None,
        time.perf_counter() - began,
    )


def _kept_or_made(
    name: str, build: Callable[[], dict[str, Tensor]]
) -> tuple[dict[str, Tensor], str]:
    """Weights and their digest, those of process 0."""
    if world() == 1:
        return cached(name, build)
    found = present(name) if rank() == 0 else None
    if not decided(lambda: found is not None):
        made = build()
        found = cached(name, lambda: made) if rank() == 0 else None
    weights, fingerprint = found or ({}, "")
    return weights, decided(lambda: fingerprint)


def _everywhere(weights: dict[str, Tensor], learner: BaseLearner) -> dict[str, Tensor]:
    """What process 0 has, in all; of what is shared out, a place that rows are dealt out from."""
    if world() == 1:
        return weights
    own = learner.own_weights()
    alike = decided(lambda: {k: v for k, v in weights.items() if not is_part(own[k])})
    empty = {k: torch.empty(v.shape, dtype=v.dtype) for k, v in own.items() if is_part(v)}
    return {**empty, **weights, **alike}


def _identity(learner: BaseLearner, recipe: Pretraining, seed: int, precision: str) -> str:
    plain = {**asdict(replace(recipe, batches=_nothing)), "batches": None}
    weights = learner.saved_weights()
    if learner.rounding is not None:
        precision = f"{precision}, {learner.rounding}"
    # Several processes add up in another order.
    several = [world(), learner.sharded] if world() > 1 else []

    def name() -> str:
        start = digest({k: v.cpu() for k, v in weights.items()})
        everything = [FORMAT, plain, learner.describe(), start, seed, precision, *several]
        return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()

    return decided(name)


def _nothing(seed: int) -> Iterator[Batch]:
    yield from ()


def _train(
    learner: BaseLearner,
    recipe: Pretraining,
    trainer: TrainerFactory,
    seed: int,
    hooks: "_Hooks",
) -> None:
    module = _Reader(learner, recipe)
    with quiet_lightning(), as_interrupt():
        warnings.filterwarnings("ignore", ".*IterableDataset.*__len__.*")
        seed_training(derive_seed(seed, "pretraining"))
        texts = _Texts(recipe, derive_seed(seed, "pretraining order"))
        learning = trainer(callbacks=[hooks], max_epochs=-1, max_steps=recipe.steps)
        without_signals(learning).fit(module, texts)


class _Texts(IterableDataset[Batch]):
    """Batches without end."""

    def __init__(self, recipe: Pretraining, seed: int) -> None:
        self.recipe = recipe
        self.seed = seed

    def __iter__(self) -> Iterator[Batch]:
        return self.recipe.batches(self.seed)


class _Reader(lightning.LightningModule):
    """Trains a learner by its own loss and the recipe's optimizer; no strategy takes part."""

    def __init__(self, learner: BaseLearner, recipe: Pretraining) -> None:
        super().__init__()
        self.learner = learner
        self.recipe = recipe
        self.window = Window()

    def configure_model(self) -> None:
        """The learner's weights are shared out already, where they are."""

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if gradient_clip_val and self.learner.sharded and gradient_clip_algorithm != "value":
            clip_by_norm(optimizer, gradient_clip_val)
        else:
            super().configure_gradient_clipping(
                optimizer, gradient_clip_val, gradient_clip_algorithm
            )

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        loss, terms = self.learner.mean_loss(batch)
        weighed = loss
        if self.trainer.accumulate_grad_batches > 1:
            weighed = self.window.weigh(loss, terms)
        return {"loss": weighed, "total": Loss(loss.detach().double() * terms, terms)}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.trainer.accumulate_grad_batches > 1:
            self.window.settle(optimizer, self.trainer.accumulate_grad_batches)

    def configure_optimizers(self) -> Any:
        recipe = self.recipe
        optimizer = AdamW(
            [p for p in self.learner.parameters() if p.requires_grad],
            lr=recipe.learning_rate,
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
        )
        schedule = LambdaLR(optimizer, recipe.rate)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class _Hooks(Callback):
    """Tells the display, and now and then looks at the loss.

    Attributes:
        loss: mean over samples or labelled tokens, since the last look but one.
    """

    EVERY = 100

    def __init__(
        self, steps: int, progress: ProgressDisplay, after_step: Callable[[], None]
    ) -> None:
        self.steps = steps
        self.progress = progress
        self.after_step = after_step
        self.loss = float("nan")
        self._seen: Loss | None = None
        self._count = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.progress.stage("pre-training", self.steps)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.after_step()
        self.progress.advance()
        self._seen = outputs["total"] if self._seen is None else self._seen + outputs["total"]
        self._count += 1
        if self._count < self.EVERY and trainer.global_step < self.steps:
            return
        self.loss = float(average_(self._seen.mean))
        self._seen, self._count = None, 0
        if self.loss != self.loss or abs(self.loss) == float("inf"):
            raise UsageError(
                f"the loss became {self.loss} in pre-training by step {trainer.global_step}; lower "
                "its rate (stream.pretrain.learning_rate=...)"
            )
        self.progress.say(f"loss {self.loss:.4g}")
