"""Replay from a memory that prefers samples which others do not explain.

The memory of a dual Gaussian process (repository sequential-gp @ 27adda3) draws what it keeps by
leverage, v_i beta_i: posterior variance times the curvature of the likelihood. Here the scores are
those of a small sparse Gaussian process on the network's features, the memory has a fixed size and
nothing is drawn twice: keys u^(1 / leverage), of which the largest stay (Efraimidis & Spirakis,
2006, A-Res). Theirs grows with every batch and draws with replacement. With equal scores this is a
uniform reservoir. The learner itself, a Gaussian process, is not here.
"""

from typing import Literal

import torch
from torch import Tensor

from cl_bench.contracts import Batch, Learner, State
from cl_bench.contracts.options import Count
from cl_bench.strategies.replay.buffer import size
from cl_bench.strategies.replay.er import ER
from cl_bench.subspace import SparseGP

LEAST = 1e-6
"""Leverage of what is wholly explained."""


class LeverageER(ER):
    """Experience replay whose memory is a weighted reservoir.

    Args:
        memory: samples kept, over all tasks.
        replay: samples replayed with every batch; None means as many as the batch holds.
        inducing: points of the sparse Gaussian process.
        score: ``leverage``, or ``uniform`` for comparison.
        curvature: beta_i: of the softmax, sum_c p_c (1 - p_c), or ``one``.
    """

    def __init__(
        self,
        memory: Count = 500,
        replay: Count | None = None,
        inducing: Count = 50,
        score: Literal["leverage", "uniform"] = "leverage",
        curvature: Literal["softmax", "one"] = "softmax",
    ) -> None:
        super().__init__(memory, replay)
        self.score, self.curvature = score, curvature
        self.process = SparseGP(inducing)
        self.keys = torch.full((memory,), -torch.inf, dtype=torch.float64)  # log u / leverage

    def after_step(self, learner: Learner, batch: Batch, out: Tensor) -> None:
        """Score what was learned at the weights as they are now, and offer it."""
        for learned in self.learned:
            self.weigh(learned, self._leverage(learner, learned))
        self.learned.clear()

    @torch.no_grad()
    def _leverage(self, learner: Learner, batch: Batch) -> Tensor:
        """Of every sample (n,), before it is part of the process."""
        if self.score == "uniform":
            return torch.ones(size(batch), dtype=torch.float64)
        with learner.evaluating():
            features = learner.features(batch).double().flatten(1)
            beta = torch.ones(len(features), dtype=torch.float64)
            if self.curvature == "softmax":
                p = learner.readout(features.to(next(learner.parameters()))).softmax(1)
                beta = (p * (1 - p)).sum(1).double().cpu()
        features = features.cpu()
        self.process.learn(features, beta)
        return (self.process.variance(features) * beta).clamp(min=LEAST)

    def weigh(self, batch: Batch, leverage: Tensor) -> None:
        """Offer samples with weights (n,): the largest keys u^(1 / weight) stay."""
        self._make_room(batch)
        uniform = torch.rand(size(batch), generator=self.rng, dtype=torch.float64)
        for i, key in enumerate((uniform.log() / leverage).tolist()):
            slot = self.seen if self.seen < self.memory else int(self.keys.argmin())
            if self.seen >= self.memory and key <= float(self.keys[slot]):
                self.seen += 1
                continue
            self.keys[slot] = key
            for name, values in batch.items():
                self.buffer[name][slot] = values[i].to(self.buffer[name])
            self.seen += 1

    def state_dict(self) -> State:
        """The reservoir's, keys, and the process."""
        own = {"keys": self.keys.clone(), "process": self.process.state_dict()}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        super().load_state_dict(state)
        self.keys = state["keys"].clone()
        self.process.load_state_dict(state["process"])
