"""A strategy around the training of Hugging Face's Trainer, and of those built on it (TRL's)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cl_bench.contracts import Batch, UsageError
from cl_bench.contracts.strategy import overrides
from cl_bench.integrations.lines import require_own_data, require_trainer
from cl_bench.integrations.pytorch import Guarded
from cl_bench.integrations.sample import Sample, as_batch
from cl_bench.integrations.session import Session
from cl_bench.parallel.ranks import world

ATTACH = "callback.attach(trainer), before trainer.train()"


class GuardCallback(TrainerCallback):
    """Guards one task: give it to the task's Trainer, ``Trainer(..., callbacks=[callback])``.

    What is projected are weights just after each step. The task is remembered when training ends. A
    strategy that replays, adds to the loss, replaces it or brings parameter groups needs a further
    line, :meth:`attach`, and says so at the end of the first step.

    Args:
        guard: of the model that is trained; the same for all tasks.
        sample: some of the task's training data, by the names that the model takes.
        classes: of the task, where tasks bring their own.
        name: of the task in reports.

    Raises:
        UsageError: the strategy needs what such a Trainer cannot give.
    """

    def __init__(
        self,
        guard: Guarded,
        *,
        sample: Sample,
        classes: range | None = None,
        name: str | None = None,
    ) -> None:
        require_trainer(guard.strategy)
        self.guard = guard
        self._sample = named(as_batch(sample))
        self._given = {"sample": self._sample, "classes": classes, "name": name}
        self._session: Session | None = None
        self._done = False

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Before the optimizer and any wrapper exist: the Trainer was just made.

        Raises:
            UsageError: it shares weights out among processes, or trains another model.
        """
        if args.fsdp or args.deepspeed:
            raise UsageError(
                "FSDP and DeepSpeed share weights out among processes, and strategies here need "
                "whole ones: leave fsdp and deepspeed out, so that processes train by DDP"
            )
        self._begin(more.get("model"))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Watch the optimizer.

        Raises:
            UsageError: the task is learned, or the Trainer was made without the callback.
        """
        if self._done:
            raise UsageError("this task is learned: make a GuardCallback for the next one")
        if self._session is None:
            if world() > 1:
                raise UsageError(
                    "give the callback to the Trainer when it is made, Trainer(..., "
                    "callbacks=[callback]), as several processes train"
                )
            self._begin(more.get("model"))
        session, optimizer = self._session, more["optimizer"]
        assert session is not None
        while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer  # what accelerate puts around it
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        trained = session.learner.trainable_parameters()
        if not session.regroups and all(id(p) in held for p in trained):
            session.called.add("param_groups")
        session.stand(None, max(1, round(args.num_train_epochs)), state.max_steps)
        session.attach(optimizer)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """The strategy may change rates, or stop."""
        if self._session and self._session.after_epoch(float("nan")):
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Weights are final.

        Raises:
            UsageError: the task took no step.
        """
        if self._session is None:
            return
        try:
            self.guard.close()
            self._done = True
        finally:
            self.release()

    def release(self) -> None:
        """Give the model back; for training that broke off."""
        self._session = None
        self.guard.release()

    def attach(self, trainer: Trainer) -> None:
        """Have a Trainer learn what the strategy makes of batches, of the loss and of groups."""
        session = self._session
        if session is None:
            raise UsageError("give the callback to the Trainer first: Trainer(callbacks=[...])")
        compute, create = trainer.compute_loss, trainer.create_optimizer

        def compute_loss(
            model: Any,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
            **more: Any,
        ) -> Any:
            if self._session is not session or not model.training:
                return compute(model, inputs, return_outputs, num_items_in_batch, **more)
            loss, outputs = self._loss(trainer, compute, model, inputs, num_items_in_batch)
            return (loss, outputs) if return_outputs else loss

        def create_optimizer(*given: Any, **more: Any) -> Any:
            create(*given, **more)
            if self._session is session:
                assert trainer.optimizer is not None
                session.regroup(trainer.optimizer)
            return trainer.optimizer

        trainer.compute_loss = compute_loss  # type: ignore[method-assign]
        if session.regroups:
            trainer.create_optimizer = create_optimizer  # type: ignore[method-assign]

    def _loss(
        self, trainer: Trainer, compute: Any, model: Any, inputs: dict[str, Any], items: Any
    ) -> tuple[Tensor, Any]:
        session = self._session
        assert session is not None
        tensors = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.dim()}
        batch = named(tensors)
        self._require_known(session, batch)
        whole = session.on_batch(batch)
        given = {**inputs, **{k: whole[to] for k, to in names(tensors).items()}}
        learner = session.learner
        scaled = items is not None and trainer.model_accepts_loss_kwargs
        scaled = scaled or trainer.compute_loss_func is not None
        share = 1 / trainer.current_gradient_accumulation_steps if scaled else 1.0
        if learner.own_objective is not None:
            outputs = model(**{k: v for k, v in given.items() if k != "labels"})
            loss = session.objective(whole, logits_of(outputs)) * share
        else:
            if whole is not batch and items is not None and scaled:
                items = items * learner.terms(whole) / learner.terms(batch)
            loss, outputs = _computed(compute, model, given, items)
        out = loss.detach() if outputs is None or type(outputs) is tuple else logits_of(outputs)
        return loss + session.penalty(whole, out) * share, outputs

    def _require_known(self, session: Session, batch: Batch) -> None:
        """Replay and losses of a strategy's own need batches that are made as its sample is."""
        learner, sample = session.learner, self._sample
        changes = overrides(learner.acting, "on_batch") or learner.own_objective is not None
        if changes and not batch.keys() & sample.keys():
            raise UsageError(
                f"{type(session.strategy).__name__} replays or replaces the loss, and batches of "
                f"this trainer ({', '.join(batch)}) hold nothing that is in its sample "
                f"({', '.join(sample)}): use a trainer that learns from labels, or a strategy that "
                "does neither"
            )

    def _begin(self, model: Any) -> None:
        if self._done or self._session is not None:
            return
        own = {id(p) for p in self.guard.learner.parameters()}
        if model is None or not any(id(p) in own for p in model.parameters()):
            raise UsageError("the guard that was given guards another model than the Trainer's")
        session = self.guard.opened(**self._given)  # type: ignore[arg-type]
        try:
            require_own_data(session)
        except UsageError:
            self.release()
            raise
        hooks = ("on_batch", "objective", "penalty", "param_groups")
        session.lines = {**session.lines, **dict.fromkeys(hooks, ATTACH)}
        self._session = session


def _computed(compute: Any, model: Any, given: dict[str, Any], items: Any) -> tuple[Tensor, Any]:
    """A Trainer's loss, with outputs where it gives them out: TRL's on-policy ones do not."""
    try:
        loss, outputs = compute(model, given, True, items)
    except ValueError as refused:
        if "returning outputs" not in str(refused):
            raise
        return compute(model, given, False, items), None
    return loss, outputs


def logits_of(outputs: Any) -> Tensor:
    """What a model says, as one of transformers tells it, by name, or on its own."""
    if isinstance(outputs, Tensor):
        return outputs
    logits: Tensor = outputs["logits"] if isinstance(outputs, Mapping) else outputs.logits
    return logits


def names(batch: Mapping[str, Tensor]) -> dict[str, str]:
    """What strategies call the tensors of a batch: images are ``x``, their labels ``y``."""
    image = "pixel_values" in batch
    own = {"pixel_values": "x", "labels": "y"} if image else {}
    return {name: own.get(name, name) for name in batch}


def named(batch: Mapping[str, Tensor]) -> Batch:
    """The batch by those names."""
    return {names(batch)[name]: value for name, value in batch.items()}
