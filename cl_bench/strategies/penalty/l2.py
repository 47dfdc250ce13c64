"""L2: every weight is pulled to where the last task left it, all alike.

L = L_t + lambda / 2 * sum_i (theta_i - theta*_i)^2: the control of EWC (Kirkpatrick et al., PNAS
2017), with every Fisher information 1.
"""

import torch

from cl_bench.contracts import LOCAL_OR_FEDERATED, Learner, Needs, Statistics, Task
from cl_bench.contracts.options import Strength
from cl_bench.strategies.penalty.quadratic import Quadratic


class L2(Quadratic):
    """The same pull at every weight, to its value after the last task that trained it.

    Args:
        strength: lambda; twice the ``reg_coef`` of GT-RIPL/Continual-Learning-Benchmark.
    """

    needs = Needs(engines=LOCAL_OR_FEDERATED, shardable=False)

    def __init__(self, strength: Strength = 1.0) -> None:
        super().__init__(strength / 2)

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """theta* <- the weights; Omega stays 1, also of a head that comes again."""
        new = {
            n: torch.zeros_like(p) if n in self.importance else torch.ones_like(p)
            for n, p in learner.named_trainable().items()
        }
        self.remember(learner, new)
