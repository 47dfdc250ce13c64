"""Learning without Forgetting (Li & Hoiem, ECCV 2016; TPAMI 2018).

With the network as it was before the task, f', and the classes of old tasks,

    L = CE(f(x), y) + lambda * KD(f'(x), f(x))   (Eq. 1 to 3, T = 2)

on new samples x alone. Where the task id is known, KD is a sum over the heads of old tasks; else it
has one softmax over all their classes. The paper's warm-up of the new head alone is left out.
"""

from torch import Tensor

from cl_bench.contracts import (
    CLASSIFIED,
    Batch,
    Learner,
    Loss,
    Needs,
    State,
    Statistics,
    Strategy,
    Task,
)
from cl_bench.contracts.learner import Snapshot
from cl_bench.contracts.options import Rate, Strength
from cl_bench.strategies.logits import (
    Logits,
    cross_entropy,
    distillation,
    open_heads,
    require_rivals,
)


class LwF(Strategy):
    """What the network said of old classes goes on being said, of new samples.

    Args:
        strength: lambda; 0 distils nothing.
        temperature: T.
        squared: whether KD is multiplied by T^2 (Hinton et al., 2015), which Li & Hoiem do not do.
        logits: classes that compete in the cross-entropy.
    """

    needs = Needs(modalities=CLASSIFIED, shardable=False)

    def __init__(
        self,
        strength: Strength = 1.0,
        temperature: Rate = 2.0,
        squared: bool = False,
        logits: Logits = "current",
    ) -> None:
        self.strength = strength
        self.temperature = temperature
        self.squared = squared
        self.logits = logits
        self.old: list[range] = []  # classes of tasks that are learned
        self.teacher: Snapshot | None = None

    def check(self, learner: Learner) -> None:
        """Classes must have something to compete with."""
        require_rivals(learner, self.logits)

    def setup(self, learner: Learner, task: Task) -> None:
        """The network as it is now is the one to learn from."""
        self.classes, self.teacher = task.classes, None
        distils = bool(self.strength and self.old)
        open_heads(learner, self.logits, old=distils)
        if distils:
            self.teacher = learner.snapshot()
            said = self.teacher(task.sample(2, learner.seed))
            self.apart = bool(said.isinf().any())  # classes of other tasks are left out

    def objective(self, learner: Learner, batch: Batch, out: Tensor) -> Loss:
        """Cross-entropy and, from the second task on, distillation."""
        among = self.classes if self.logits == "current" else None
        found = cross_entropy(learner, out, batch, among)
        if self.teacher is None:
            return found
        old = self.teacher.readout(self.teacher.features(batch))
        new = learner.readout(learner.features(batch)) if self.apart else out
        whole = range(max(classes.stop for classes in self.old))
        for c in self.old if self.apart else [whole]:
            part = (new[:, c.start : c.stop], old[:, c.start : c.stop])
            kd = distillation(*part, self.temperature, self.squared).double().sum()
            found = Loss(found.sum + self.strength * kd, found.count)
        return found

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """The task's classes are old ones from now on."""
        if task.classes not in self.old:
            self.old.append(task.classes)

    def release(self, learner: Learner) -> None:
        """The copy is of no use any more."""
        self.teacher = None

    def state_dict(self) -> State:
        """Which classes are old."""
        return {"old": [[classes.start, classes.stop] for classes in self.old]}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.old = [range(start, stop) for start, stop in state["old"]]
