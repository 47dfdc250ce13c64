"""Dark Experience Replay (Buzzega et al., NeurIPS 2020; github.com/aimagelab/mammoth @ e75a491).

A reservoir keeps what the network said of every sample when it was learned, z, before that step.
With (x', z') drawn from it beside each batch (x, y),

    L = CE(f(x), y) + alpha * MSE(f(x'), z')   (Eq. 5)

The mean square goes over the classes of which the network spoke then. New samples and old ones go
through the network at once; the authors' code has them follow each other, which is another thing
to batch normalisation.
"""

import torch
from torch import Tensor

from cl_bench.contracts import Batch, Learner, Loss
from cl_bench.contracts.learner import Heads
from cl_bench.contracts.options import Count, Strength
from cl_bench.strategies.logits import Logits, cross_entropy, only
from cl_bench.strategies.replay.rehearsal import DRAW, ReplayTerms


class DER(ReplayTerms):
    """Replays old answers.

    Args:
        alpha: weight of the mean square; 0 replays nothing.
        memory: samples kept, over all tasks.
        replay: samples replayed with every batch; None means as many as the batch holds.
        logits: classes that compete in the cross-entropy of new samples; with ``all``, answers for
            classes to come are kept and replayed too.
    """

    def __init__(
        self,
        alpha: Strength = 0.3,
        memory: Count = 500,
        replay: Count | None = None,
        logits: Logits = "all",
    ) -> None:
        super().__init__(memory, replay, logits)
        self.alpha = alpha
        self.draws = int(alpha > 0)

    def term(self, k: int, learner: Learner, batch: Batch, out: Tensor) -> Loss:
        """Cross-entropy of what is new, the mean square of what is old."""
        if k == 0:
            among = self.classes if self.logits == "current" else None
            return cross_entropy(learner, out, batch, among)
        apart = apart_from(out, batch["logits"], batch["known"])
        return Loss(self.alpha * apart.double().sum(), len(out))

    def penalty(self, learner: Learner, batch: Batch, out: Tensor) -> None:
        """Asked of every batch that is learned, and of no other: its answers are kept here."""
        if not self.draws:
            return
        answers = out.detach()
        if len(out) < sum(self.sizes):  # other processes have the rest
            with torch.no_grad(), learner.evaluating():
                heads: Heads = "all" if self.logits == "all" else "seen"
                answers = learner.readout(learner.features(self.new), heads)
            if out.isinf().any():  # classes of other tasks are left out
                answers = only(answers, self.classes)
        answers = answers[: self.sizes[0]].to(batch["x"].dtype)
        known = torch.full((len(answers),), answers.shape[1])
        said = answers.masked_fill(answers.isinf(), 0.0)  # classes of other tasks, if left out
        self.learned[-1] |= {"logits": said, "known": known}

    def on_batch(self, learner: Learner, batch: Batch) -> Batch:
        """The batch and the draws."""
        whole = super().on_batch(learner, batch)
        self.new = {k: v[: self.sizes[0]] for k, v in whole.items() if k != DRAW}
        return whole


def apart_from(out: Tensor, logits: Tensor, known: Tensor) -> Tensor:
    """Mean square (n,) between answers (n, C) and older ones (n, D), D <= C.

    Of each sample's older ones the first ``known`` (n,) say something; classes that are left out of
    ``out`` do not count.
    """
    out = out[:, : logits.shape[1]]
    counts = (torch.arange(out.shape[1], device=out.device) < known.unsqueeze(1)) & ~out.isinf()
    squares = (out.masked_fill(~counts, 0.0) - logits.to(out) * counts).square()
    return squares.sum(1) / counts.sum(1).clamp_min(1)
