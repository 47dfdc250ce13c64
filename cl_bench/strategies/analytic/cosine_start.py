"""A first task that is learned with a cosine head, which is left behind.

The head's logits are a cos(f, w_c), a learned from 1 (LAMDA-PILOT @ 5240714, backbone/linears.py).
"""

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cl_bench.contracts import Batch, Learner, Loss
from cl_bench.strategies.analytic.closed_form import ClosedForm


class Scale(nn.Module):
    """A factor, at first 1."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))


def cosine_loss(learner: Learner, batch: Batch, scale: Scale, start: int = 0) -> Loss:
    """Cross-entropy over a task's classes, from ``start``, of scaled cosines with its head's rows.

    The head is that of the task that is learned.
    """
    f = learner.features(batch)
    eye = torch.eye(f.shape[1], device=f.device, dtype=f.dtype)
    offset = learner.readout(eye.new_zeros(1, len(eye)), heads="current")
    weight = learner.readout(eye, heads="current") - offset  # of the head, (d, c)
    logits = scale.factor.to(f) * F.normalize(f, dim=1) @ F.normalize(weight, dim=0)
    terms = F.cross_entropy(logits, batch["y"] - start, reduction="none")
    return Loss(terms.double().sum(), len(f))


class CosineStart(ClosedForm):
    """Trains the network on the first task, if at all, by cross-entropy of scaled cosines."""

    @property
    def idle(self) -> frozenset[str]:  # type: ignore[override]
        """Nothing is trained in no epochs."""
        return frozenset({"modules", "objective"} if self.epochs == 0 else ())

    def modules(self, learner: Learner) -> Mapping[str, nn.Module]:
        """The factor, while the first task is learned."""
        return {} if self.counts.numel() or self.epochs == 0 else {"scale": Scale()}

    def objective(self, learner: Learner, batch: Batch, out: Tensor) -> Loss:
        """Cross-entropy over the task's classes."""
        return cosine_loss(learner, batch, cast(Scale, learner.extras(self)["scale"]))
