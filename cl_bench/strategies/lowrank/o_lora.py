"""Orthogonal Low-Rank Adaptation (Wang et al., Findings of EMNLP 2023, "O-LoRA").

Every task t learns a pair (A_t, B_t) of its own, W_t = W_{t-1} + alpha / r B_t A_t with A_t (r, d)
and B_t (o, r), while everything else is frozen. What it reads is kept away from what earlier pairs
read:

    loss + lambda1 sum_layers sum_{i<t} sum |A_i A_t^T| + lambda2 sum (||A_t||_2 + ||B_t||_2).

The paper puts the constraint on its "A", the up-projection; the authors' code puts it on PEFT's
``lora_A``, the down-projection, whose rows span what the pair reads. This follows the code
(github.com/cmnfriend/O-LoRA), also in summing absolute values and unsquared norms.

Without the two penalties this is ``inc_lora``, and with one pair for all tasks ``seq_lora``.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from cl_bench.contracts import Batch, Learner, Task, UsageError
from cl_bench.contracts.options import Inherited, Strength
from cl_bench.strategies.lowrank.pairs import LowRankPairs

PerTask = Strength | Mapping[str, Strength]
"""One number, or numbers by shell patterns of task names, of which the first that fits counts."""


class OLoRA(LowRankPairs):
    """Low-rank pairs that read what earlier ones do not.

    Args:
        lambda1: of the overlap with earlier pairs.
        lambda2: of the pair's norms.
        shared: as in :class:`LowRankPairs`.

    Raises:
        UsageError: an option is out of range, or has no effect.
    """

    def __init__(
        self, *, lambda1: PerTask = 0.5, lambda2: PerTask = 0.0, **shared: Inherited
    ) -> None:
        super().__init__(**shared)
        for name, strength in (("lambda1", lambda1), ("lambda2", lambda2)):
            if isinstance(strength, Mapping) and "*" not in strength:
                raise UsageError(
                    f"strategy.{name}={dict(strength)}: add a last pattern '*' for tasks that no "
                    "other pattern names"
                )
        self.lambda1 = lambda1
        self.lambda2 = lambda2
        self._strengths = (0.0, 0.0)

    def setup(self, learner: Learner, task: Task) -> None:
        """The pairs, and what the task says of their strengths."""
        self._strengths = _of_task(self.lambda1, task), _of_task(self.lambda2, task)
        super().setup(learner, task)

    def penalty(self, learner: Learner, batch: Batch, out: Tensor) -> Tensor | None:
        """lambda1 sum |A_i A_t^T| + lambda2 sum (||A_t|| + ||B_t||)."""
        if not self.layers:
            return None
        lambda1, lambda2 = self._strengths
        terms = []
        if lambda1 and self.past:
            terms.append(lambda1 * torch.stack([o.abs().sum() for o in self._products()]).sum())
        if lambda2:
            both = [w for name in self.layers for w in self._weights(name)]
            terms.append(lambda2 * torch.stack([torch.linalg.vector_norm(w) for w in both]).sum())
        return torch.stack(terms).sum() if terms else None


def _of_task(strength: PerTask, task: Task) -> float:
    if not isinstance(strength, Mapping):
        return strength
    return next(value for pattern, value in strength.items() if fnmatchcase(task.name, pattern))
