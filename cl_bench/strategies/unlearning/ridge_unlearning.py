"""Exact unlearning: a ridge readout on frozen features, from whose sums requests are taken out.

beta = (Z^T Z + rho I)^-1 Z^T Y over all samples that were learned and not asked to be forgotten:
what is left is, to rounding, what would be there had the forgotten samples never come. The features
must not have learned from them either: they are those of the first weights.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from cl_bench.contracts import (
    CLASSIFIED,
    Batch,
    Learner,
    Needs,
    Plan,
    State,
    Statistics,
    Strategy,
    Stream,
    Task,
)
from cl_bench.contracts.options import Rate
from cl_bench.strategies.replay.buffer import in_pieces


class RidgeUnlearning(Strategy):
    """Trains nothing; adds up a task's samples and takes out a request's.

    Args:
        ridge: rho.
    """

    needs = Needs(modalities=CLASSIFIED, forgets=True)

    def __init__(self, ridge: Rate = 1.0) -> None:
        self.ridge = ridge
        self.gram = self.cross = torch.zeros(0, 0, dtype=torch.float64)

    def plan(self, stream: Stream, t: int) -> Plan:
        """No epochs."""
        return Plan(stream[t].train, epochs=0)

    @torch.no_grad()
    def collect(self, learner: Learner, task: Task) -> Statistics:
        """Z^T Z (d, d) and Z^T Y (d, classes so far) of the task's samples."""
        classes = max(task.classes.stop, self.cross.shape[1])
        gram: Tensor | float = 0.0
        cross: Tensor | float = 0.0
        with learner.evaluating():
            for batch in in_pieces(task.train, 1000):
                z = learner.features(batch).double().cpu()
                gram = gram + z.t() @ z
                cross = cross + z.t() @ F.one_hot(batch["y"].cpu(), classes).double()
        return {"gram": torch.as_tensor(gram), "cross": torch.as_tensor(cross)}

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """Add, or take out."""
        sign = -1.0 if task.kind == "forget" else 1.0
        gram, cross = torch.as_tensor(stats["gram"]), torch.as_tensor(stats["cross"])
        if not len(self.gram):
            self.gram, self.cross = torch.zeros_like(gram), torch.zeros_like(cross)
        self.cross = F.pad(self.cross, (0, cross.shape[1] - self.cross.shape[1]))
        self.gram, self.cross = self.gram + sign * gram, self.cross + sign * cross

    @property
    def beta(self) -> Tensor:
        """The readout (d, classes)."""
        ridge = self.ridge * torch.eye(len(self.gram), dtype=torch.float64)
        found: Tensor = torch.linalg.solve(self.gram + ridge, self.cross)
        return found

    def predict(self, learner: Learner, batch: Batch, task: Task | None) -> Tensor:
        """The readout's; before any task what the network says."""
        if not len(self.gram):
            return learner(batch)
        features = learner.features(batch)
        out = (features.double() @ self.beta.to(features.device)).to(features)
        if task is None:
            return out
        own = torch.zeros(out.shape[1], dtype=torch.bool, device=out.device)
        own[task.classes.start : task.classes.stop] = True
        return out.masked_fill(~own, -torch.inf)

    def state_dict(self) -> State:
        """The sums."""
        return {"gram": self.gram, "cross": self.cross}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.gram, self.cross = state["gram"], state["cross"]
