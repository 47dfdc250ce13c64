"""DER++ (Buzzega et al., NeurIPS 2020, Eq. 6): Dark Experience Replay with old labels beside them.

    L = CE(f(x), y) + alpha * MSE(f(x'), z') + beta * CE(f(x''), y'')

x' and x'' are drawn from the reservoir independently.
"""

from torch import Tensor

from cl_bench.contracts import Batch, Learner, Loss
from cl_bench.contracts.options import Inherited, Strength
from cl_bench.strategies.logits import cross_entropy
from cl_bench.strategies.replay.der import DER


class DERpp(DER):
    """Replays old answers, and old labels.

    Args:
        beta: weight of the cross-entropy of old samples, over all classes that compete then.
        shared: as in :class:`DER`.
    """

    def __init__(self, *, beta: Strength = 0.5, **shared: Inherited) -> None:
        super().__init__(**shared)
        self.beta = beta
        self.draws = 2 if beta else self.draws

    def term(self, k: int, learner: Learner, batch: Batch, out: Tensor) -> Loss:
        """As of DER, and of the second draw its labels."""
        if k < 2:
            return super().term(k, learner, batch, out)
        found = cross_entropy(learner, out, batch, None)
        return Loss(self.beta * found.sum, found.count)
