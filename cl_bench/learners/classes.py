"""Outputs that are logits of classes (n, C), whoever made them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from cl_bench.contracts import Batch
from cl_bench.learners.evaluation import Evaluation
from cl_bench.learners.readout import Readout
from cl_bench.metrics import ANSWERED, TASK_AWARE


class Classes(Readout, Evaluation):
    """Mixin: what classes a task has, and what is asked of their logits.

    Attributes:
        head_of_class: int64 (C,), the head of each class of the label space.
    """

    head_of_class: Tensor

    def score(self, out: Tensor, batch: Batch) -> Tensor:
        """1 where the most likely class is right."""
        return (out.argmax(1) == batch["y"]).double()

    def details(self, out: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """Where classes of all tasks compete: the score without other tasks', and who answers."""
        if self.scenario != "class":
            return {}
        owner = self.head_of_class[batch["y"]]
        answered = self.head_of_class[out.argmax(1)]
        shares = {f"{ANSWERED}{i}": (answered == i).double() for i in range(self.seen_heads)}
        return {TASK_AWARE: self.score(self._of_heads(out, owner), batch), **shares}

    def _of_heads(self, logits: Tensor, heads: Tensor) -> Tensor:
        """Logits (n, seen) with the classes of other heads than each sample's (n,) left out."""
        foreign = self.head_of_class[: logits.shape[1]] != heads.unsqueeze(1)
        return logits.masked_fill(foreign, -torch.inf)

    def draw_labels(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch with ``y`` drawn from the model's own predictions."""
        batch = self._to_device(batch)
        with torch.no_grad(), self.evaluating():
            likelihood = self.answer(batch, self.task).softmax(1).cpu()
        drawn = torch.multinomial(likelihood, 1, generator=generator).squeeze(1)
        return {**batch, "y": drawn.to(batch["y"].device)}

    def label_logits(self, out: Tensor, batch: Batch) -> Tensor:
        """Logit of every sample's own class (n,)."""
        return out.gather(1, batch["y"].unsqueeze(1)).squeeze(1)
