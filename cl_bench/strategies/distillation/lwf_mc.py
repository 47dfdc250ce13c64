"""LwF.MC: distillation by sigmoids (Rebuffi et al., CVPR 2017; github.com/aimagelab/mammoth).

The baseline of iCaRL: its loss without its exemplars. Every class is a question of its own; of old
classes the network as it was before the task gives the answer, of others the label:

    L = mean_c BCE(sigmoid(f_c(x)), sigmoid(f'_c(x)) if c is old else [y = c]).
"""

from torch import Tensor

from cl_bench.contracts import CLASSIFIED, Batch, Learner, Loss, Needs, Strategy, Task
from cl_bench.contracts.learner import Snapshot
from cl_bench.strategies.logits import Asked, open_heads, sigmoid_distillation


class LwFMC(Strategy):
    """Old answers and new labels, class by class.

    Args:
        logits: classes that are asked for: those seen so far, or those of tasks to come as well.
    """

    needs = Needs(modalities=CLASSIFIED, scenarios=frozenset({"class"}), shardable=False)

    def __init__(self, logits: Asked = "seen") -> None:
        self.logits = logits
        self.teacher: Snapshot | None = None

    def setup(self, learner: Learner, task: Task) -> None:
        """The network as it is now is the one to learn from."""
        open_heads(learner, self.logits, old=True)
        self.old = task.classes.start
        self.teacher = learner.snapshot() if self.old else None

    def objective(self, learner: Learner, batch: Batch, out: Tensor) -> Loss:
        """Binary cross-entropy."""
        terms = sigmoid_distillation(out, batch, self.teacher, self.old)
        return Loss(terms.double().sum(), len(out))

    def release(self, learner: Learner) -> None:
        """The copy is of no use any more."""
        self.teacher = None
