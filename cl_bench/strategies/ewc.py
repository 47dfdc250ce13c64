"""Elastic Weight Consolidation (Kirkpatrick et al., PNAS 2017).

Old tasks pull every weight back in proportion to its Fisher information:
L = L_t + lambda / 2 * sum_j sum_i F_j,i (theta_i - theta_j,i)^2 over old tasks j   (Eq. 3, summed).
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from cl_bench.contracts import (
    Batch,
    Learner,
    Needs,
    State,
    Statistics,
    Strategy,
    Task,
    UsageError,
    generator,
)


class EWC(Strategy):
    """Quadratic penalty on the diagonal of the Fisher information.

    The sum over old tasks is one quadratic, with F = sum F_j and centre
    theta* = sum F_j theta_j / F (its constant has no gradient): memory does not grow with tasks.

    Args:
        strength: lambda.
        samples: training samples that estimate the Fisher information of a task.
        fisher: labels drawn from the model's own prediction (``true``) or the data's
            (``empirical``).
        decay: gamma in [0, 1] on old information at each new task (online EWC, Schwarz et al.,
            ICML 2018); 1 is the sum of Kirkpatrick et al.
    """

    needs = Needs(engine="any", shardable=False)

    def __init__(
        self,
        strength: float = 100.0,
        samples: int = 1000,
        fisher: Literal["true", "empirical"] = "true",
        decay: float = 1.0,
    ) -> None:
        if strength < 0:
            raise UsageError(f"strategy.strength={strength}: must not be negative")
        if samples < 1:
            raise UsageError(f"strategy.samples={samples}: at least one sample is needed")
        if fisher not in ("true", "empirical"):
            raise UsageError(f"strategy.fisher={fisher!r}: use 'true' or 'empirical'")
        if not 0.0 <= decay <= 1.0:
            raise UsageError(f"strategy.decay={decay}: must lie in [0, 1]")
        self.strength = strength
        self.samples = samples
        self.fisher = fisher
        self.decay = decay
        self.information: dict[str, Tensor] = {}
        self.centre: dict[str, Tensor] = {}

    def penalty(self, learner: Learner, batch: Batch, out: Tensor) -> Tensor | None:
        """Penalty lambda / 2 * sum_i F_i (theta_i - theta*_i)^2."""
        weights = {n: p for n, p in learner.named_trainable().items() if n in self.information}
        if not weights:
            return None
        terms = [
            (self.information[n].to(p) * (p - self.centre[n].to(p)).square()).sum()
            for n, p in weights.items()
        ]
        return 0.5 * self.strength * torch.stack(terms).sum()

    def collect(self, learner: Learner, task: Task) -> Statistics:
        """Sum over samples of the squared gradient of the log-likelihood, and their number."""
        batch = task.sample(self.samples, learner.seed)
        rng = generator(learner.seed, "fisher", task.index)
        count = len(next(iter(batch.values())))
        total: dict[str, Tensor] = {"samples": torch.tensor(float(count))}
        for start in range(0, count, 64):
            piece = {k: v[start : start + 64] for k, v in batch.items()}
            if self.fisher == "true":
                piece = learner.draw_labels(piece, rng)
            for name, gradient in learner.gradients(piece, per_sample=True).items():
                squared = gradient.square().sum(0)
                total[name] = total[name] + squared if name in total else squared
        return total

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """F <- gamma F + F_t, theta* <- the minimum of the summed quadratics."""
        count = stats["samples"]
        for name, p in learner.named_trainable().items():
            new = stats[name] / count  # type: ignore[operator]
            theta = p.detach().clone()
            if name not in self.information:
                self.information[name], self.centre[name] = new, theta
                continue
            old = self.decay * self.information[name].to(new)
            whole = old + new
            pull = torch.where(whole > 0, new / whole.clamp_min(1e-38), 0.0)
            self.centre[name] = torch.lerp(self.centre[name].to(theta), theta, pull)
            self.information[name] = whole

    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """Mean Fisher information of every parameter tensor."""
        return {n: {"fisher_mean": float(f.mean())} for n, f in self.information.items()}

    def state_dict(self) -> State:
        """Fisher information and centre."""
        return {"information": dict(self.information), "centre": dict(self.centre)}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.information, self.centre = dict(state["information"]), dict(state["centre"])
