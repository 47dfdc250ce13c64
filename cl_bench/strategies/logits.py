"""Which classes compete in a softmax, and what one network learns of another's answers.

What is here gives a number for every sample, (n,).
"""

from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from cl_bench.contracts import Batch, Learner, Loss, UsageError
from cl_bench.contracts.learner import Snapshot

Logits = Literal["current", "seen", "all"]
"""Classes that compete while a task is learned, where tasks bring classes of their own: the task's,
those that were met so far, or those of tasks to come as well."""


Asked = Literal["seen", "all"]
"""The same where old classes take part in any case."""


def require_rivals(learner: Learner, logits: Logits) -> None:
    """In ``check``: :class:`UsageError` if a class of some task has none to compete with."""
    heads = [name for name, role in learner.roles().items() if role == "head"]
    if logits == "current" and any(len(learner.weights()[name]) == 1 for name in heads):
        raise UsageError(
            "strategy.logits=current: a task of this stream has one class, which nothing would "
            "compete with, so that nothing would be learned; use strategy.logits=seen, or all"
        )


def open_heads(learner: Learner, logits: Logits, old: bool) -> None:
    """In ``setup``: have the heads take part that ``logits`` asks for, and ``old`` ones if told."""
    if logits == "all":
        learner.train_heads("all")
    elif old:
        learner.train_heads("seen")


def only(out: Tensor, classes: range) -> Tensor:
    """Logits (n, C) with those of other classes left out."""
    kept = torch.full_like(out, -torch.inf)
    kept[:, classes.start : classes.stop] = out[:, classes.start : classes.stop]
    return kept


def present(out: Tensor, classes: Tensor, seen: int) -> Tensor:
    """Logits (n, C) with those left out that are below ``seen`` and not among ``classes`` (k,)."""
    left = torch.arange(out.shape[1], device=out.device) < seen
    left[classes] = False
    return out.masked_fill(left, -torch.inf)


def cross_entropy(learner: Learner, out: Tensor, batch: Batch, among: range | None) -> Loss:
    """Over the classes ``among``; None takes those that ``out`` has, as the learner itself does."""
    if among is None:
        return learner.total_loss(out, batch)
    terms = F.cross_entropy(only(out, among), batch["y"], reduction="none")
    return Loss(terms.double().sum(), len(out))


def distillation(new: Tensor, old: Tensor, temperature: float, squared: bool) -> Tensor:
    """Cross-entropy of softmax(new / T) under softmax(old / T), times T^2 where ``squared``."""
    wanted = (old.to(new) / temperature).softmax(1)
    found = -(wanted * (new / temperature).log_softmax(1)).sum(1)
    return temperature**2 * found if squared else found


def sigmoid_distillation(out: Tensor, batch: Batch, teacher: Snapshot | None, old: int) -> Tensor:
    """Binary cross-entropy, a mean over classes.

    Of the first ``old`` classes with what ``teacher`` says of them, of others with the label.
    """
    wanted = F.one_hot(batch["y"], out.shape[1]).to(out)
    if teacher is not None and old:
        wanted[:, :old] = teacher(batch)[:, :old].to(out).sigmoid()
    return F.binary_cross_entropy_with_logits(out, wanted, reduction="none").mean(1)
