"""What somebody else's model says of a batch, and what is asked of it: classes, or tokens."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cl_bench.contracts import IGNORE, Batch, Loss, UsageError
from cl_bench.contracts.learner import Heads, Mode, Of, PerSample
from cl_bench.contracts.loss import Count
from cl_bench.learners.classes import Classes
from cl_bench.learners.modes import reaching

Forward = Callable[[Any, Batch], Tensor]
"""Outputs of a model for a batch ``{"x": ..., "y": ...}``."""

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""Mean loss from outputs and labels, as ``torch.nn.functional.cross_entropy``."""

CALLED_WITH = ("input_ids", "attention_mask", "decoder_input_ids", "position_ids")
"""What a model of transformers takes of a batch of text."""


class Outputs(Classes):
    """Mixin: calls a model that is not ours, and cuts its logits to what a task may know.

    Attributes:
        seen_classes: of the label space, so many from its beginning on.
    """

    seen_classes: int
    _model: nn.Module
    _loss: LossFunction | None
    _forward: Forward | None

    def __call__(self, batch: Batch, head: int | None = None) -> Tensor:
        """Outputs for a batch, as strategies see them; see :meth:`shown`.

        Raises:
            UsageError: heads are not known, or nothing says how to call the model.
        """
        if head is not None:
            return self.readout(self._features(batch), head)
        return self.shown(self._said(batch), batch)

    def _said(self, batch: Batch) -> Tensor:
        if self._forward is not None:
            return self._forward(self._model, batch)
        if "x" in batch:
            out: Any = self._model(batch["x"])
            said: Tensor = out if isinstance(out, Tensor) else out.logits
            return said
        config: Any = getattr(self._model, "config", None)
        if "input_ids" not in batch or config is None:
            raise UsageError(
                f"the sample has {', '.join(batch)} but no 'x': say how the model is called, "
                "for example forward=lambda model, batch: model(**batch).logits"
            )
        given = {name: batch[name] for name in CALLED_WITH if name in batch}
        if getattr(config, "is_encoder_decoder", False) and "labels" in batch:
            given["labels"] = batch["labels"]
        logits: Tensor = self._model(**given, use_cache=False).logits
        return logits

    def shown(self, out: Tensor, batch: Batch) -> Tensor:
        """Logits without classes that no task has brought yet, or that the known task id rules out.

        Outputs that are no logits of classes, or of classes that all tasks share, are as they are.
        """
        if self.scenario == "domain" or out.dim() != 2:
            return out
        if not (self.open_heads and self._model.training):
            out = out[:, : self.seen_classes]
        if self.scenario == "task":
            out = self._of_heads(out, batch["task"])
        return out

    # -- heads ------------------------------------------------------------------------------------

    def _features(self, batch: Batch) -> Tensor:
        if not len(self.heads):
            raise UsageError(
                "this strategy asks for what the output layer reads, and which layer that is is "
                "not known in somebody else's model: name it, for example Guarded(..., "
                "heads=['fc'])"
            )
        features = reaching(self.heads[0], lambda: self._said(batch))
        return features if "input_ids" in batch else features.flatten(1)

    def readout(self, features: Tensor, heads: Heads = "seen") -> Tensor:
        """Logits (n, classes) that heads make of features, side by side.

        Raises:
            UsageError: there is no such head, or none is known.
        """
        if len(self.heads) != 1:
            return super().readout(features, heads) if len(self.heads) else self._features({})
        logits: Tensor = self.heads[0](features)
        if self.scenario == "domain" or heads == "all" or not isinstance(heads, str):
            return logits
        first = self.task.classes.start if heads == "current" and self.task else 0
        return logits[..., first : self.seen_classes]

    # -- loss and scores --------------------------------------------------------------------------

    def _tokens(self, out: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (n, K, vocabulary) and the labels (n, K) that they predict, side by side."""
        if getattr(getattr(self._model, "config", None), "is_encoder_decoder", False):
            return out, batch["labels"]
        return out[:, :-1], batch["labels"][:, 1:]

    def loss(self, out: Tensor, batch: Batch) -> Tensor:
        """Mean loss over the batch: the one that was given, else cross-entropy of tokens.

        Raises:
            UsageError: no loss was given, and the batch is no text.
        """
        if self._loss is not None:
            return self._loss(out, batch["labels"] if is_text(batch) else labels_of(batch))
        if not is_text(batch) and hasattr(self._model, "config"):  # as transformers' own
            return F.cross_entropy(out, labels_of(batch))
        if not is_text(batch):
            raise UsageError("this strategy needs the loss: give loss=F.cross_entropy (or yours)")
        logits, labels = self._tokens(out, batch)
        flat = logits.flatten(0, 1), labels.flatten()
        total = F.cross_entropy(*flat, ignore_index=IGNORE, reduction="sum")
        return total / (labels != IGNORE).sum().clamp_min(1)

    def terms(self, batch: Batch) -> Count:
        """Samples, or labelled tokens."""
        if not is_text(batch):
            return len(next(iter(batch.values())))
        return (self._tokens(batch["labels"], batch)[1] != IGNORE).sum()

    def total_loss(self, out: Tensor, batch: Batch) -> Loss:
        """The loss as what may be added up over batches, in double precision."""
        terms = int(self.terms(batch))
        return Loss(self.loss(out, batch).double() * terms, terms)

    def label_logits(self, out: Tensor, batch: Batch) -> Tensor:
        """Logit of every sample's own label, or the mean over its labelled tokens (n,)."""
        if not is_text(batch):
            return super().label_logits(out, {**batch, "y": labels_of(batch)})
        logits, labels = self._tokens(out, batch)
        learned = labels != IGNORE
        own = logits.gather(2, labels.clamp_min(0)[:, :, None]).squeeze(2)
        return (own * learned).sum(1) / learned.sum(1).clamp_min(1)

    def score(self, out: Tensor, batch: Batch) -> Tensor:
        """1 where the most likely class is right, or every labelled token."""
        if not is_text(batch):
            return super().score(out, {**batch, "y": labels_of(batch)})
        logits, labels = self._tokens(out, batch)
        return ((logits.argmax(2) == labels) | (labels == IGNORE)).all(1).double()

    def finite(self, out: Tensor, batch: Batch) -> Tensor:
        """Whether every sample's outputs say anything: bool (n,); of text, those with a label."""
        if not is_text(batch):
            return super().finite(out, batch)
        logits, labels = self._tokens(out, batch)
        return (logits.amax(2).isfinite() | (labels == IGNORE)).all(1)

    def draw_labels(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch with labels drawn from the model's own predictions."""
        if not is_text(batch):
            return super().draw_labels({**batch, "y": labels_of(batch)}, generator)
        moved = self._to_device(batch)
        with torch.no_grad(), self.evaluating():
            logits, wanted = self._tokens(self(moved), moved)
        likelihood, learned = logits.float().softmax(2).cpu(), (wanted != IGNORE).cpu()
        drawn = torch.multinomial(likelihood[learned], 1, generator=generator).squeeze(1)
        labels = batch["labels"].clone()
        part = self._tokens(labels, {**batch, "labels": labels})[1]
        part[part != IGNORE] = drawn.to(part.device)
        return {**batch, "labels": labels}

    def counted(self, batch: Batch, layer: str) -> Tensor | None:
        """Which tokens (n, L) are no padding, if the sample says so as Hugging Face's models do."""
        mask = batch.get("attention_mask")
        return None if mask is None else mask.bool()

    def gradients(
        self,
        batch: Batch,
        of: Of = "loss",
        per_sample: PerSample = False,
        mode: Mode = "eval",
    ) -> dict[str, Tensor]:
        """As for every learner."""
        if not per_sample:
            return super().gradients(batch, of, per_sample, mode)
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no batching rule
            return super().gradients(batch, of, per_sample, mode)


def is_text(batch: Batch) -> bool:
    """Whether the batch has a label for every token, as Hugging Face's models take it."""
    return "y" not in batch and "labels" in batch and batch["labels"].dim() == 2


def labels_of(batch: Batch) -> Tensor:
    """Labels of samples; raises :class:`UsageError` if the batch has none."""
    if "y" not in batch:
        raise UsageError("this strategy needs labels: give sample=(x, y)")
    return batch["y"]
