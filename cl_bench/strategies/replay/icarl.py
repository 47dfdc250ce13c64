"""iCaRL (Rebuffi et al., CVPR 2017).

The network learns as LwF.MC does, from samples of the task and those that are kept. What answers is
the nearest mean of exemplars: with phi normalised features, mu_c the mean of phi over the exemplars
of class c, normalised as well, argmax_c phi(x)^T mu_c. Exemplars are chosen by herding (Alg. 4).
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from cl_bench.contracts import Batch, Learner, Loss, State, Statistics, Task
from cl_bench.contracts.options import Count
from cl_bench.strategies.logits import Asked, open_heads, sigmoid_distillation
from cl_bench.strategies.replay.buffer import Part, in_pieces
from cl_bench.strategies.replay.classwise import Classwise, Select, normalised


class ICaRL(Classwise):
    """Exemplars teach the network, and answer in its place.

    Args:
        memory: samples kept, over all classes.
        select: which of a class.
        logits: classes that the loss asks for: seen so far, or those of tasks to come as well.
    """

    def __init__(
        self, memory: Count = 2000, select: Select = "herding", logits: Asked = "seen"
    ) -> None:
        super().__init__(memory, select)
        self.logits = logits
        self.means: dict[int, Tensor] = {}  # (d,) by class

    def setup(self, learner: Learner, task: Task) -> None:
        """As always, with the heads that the loss asks for."""
        super().setup(learner, task)
        open_heads(learner, self.logits, old=True)

    def objective(self, learner: Learner, batch: Batch, out: Tensor) -> Loss:
        """Binary cross-entropy with old answers and new labels (Alg. 3)."""
        terms = sigmoid_distillation(out, batch, self.teacher, self.old)
        return Loss(terms.double().sum(), len(out))

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """Choose exemplars; the means of all classes are those of the network as it is now."""
        super().consolidate(learner, task, stats)
        self.means = {
            c: F.normalize(
                torch.cat(
                    [normalised(learner, b) for b in in_pieces(Part(kept), learner.batch_size)]
                ).mean(0),
                dim=0,
            )
            for c, kept in self.kept.classes.items()
        }

    def predict(self, learner: Learner, batch: Batch, task: Task | None) -> Tensor:
        """Cosines (n, classes) with the means; before any task what the network says."""
        if not self.means:
            return learner(batch)
        f = F.normalize(learner.features(batch), dim=1)
        known = [c for c in self.means if not task or c in task.classes]
        logits = f.new_full((len(f), max(self.means) + 1), -torch.inf)
        logits[:, known] = f @ torch.stack([self.means[c] for c in known]).to(f).t()
        return logits

    def state_dict(self) -> State:
        """What is kept, and the means."""
        return {**super().state_dict(), "means": dict(self.means)}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        super().load_state_dict(state)
        self.means = dict(state["means"])
