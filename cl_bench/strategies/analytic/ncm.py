"""Nearest class mean on frozen features (SimpleCIL: Zhou et al., IJCV 2024; LAMDA-PILOT @ 5240714).

mu_c is the mean of the features of class c; a sample's logits are its cosines with all mu_c.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from cl_bench.contracts import (
    LOCAL_OR_FEDERATED,
    Batch,
    FederatedStrategy,
    Learner,
    Needs,
    Plan,
    State,
    Statistics,
    Stream,
    Task,
)


class NCM(FederatedStrategy):
    """Trains nothing: the network keeps its first weights, classes are known by their means."""

    needs = Needs(engines=LOCAL_OR_FEDERATED, modalities=frozenset({"image"}))

    def __init__(self) -> None:
        self.sums: dict[int, Tensor] = {}  # of features (d,), by class
        self.counts: dict[int, float] = {}

    def plan(self, stream: Stream, t: int) -> Plan:
        """No epochs."""
        return Plan(stream[t].train, epochs=0)

    @torch.no_grad()
    def collect(self, learner: Learner, task: Task) -> Statistics:
        """Features summed by class, (classes of the task, d), and how many there are."""
        found = []
        with learner.evaluating():
            for start in range(0, len(task.train), learner.batch_size):
                batch = task.train[torch.arange(len(task.train))[start:][: learner.batch_size]]
                one = F.one_hot(batch["y"] - task.classes.start, len(task.classes)).double().t()
                found.append((one @ learner.features(batch).double().cpu(), one.sum(1)))
        return {"sums": sum(s for s, _ in found), "counts": sum(n for _, n in found)}

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """Where a class comes again, its mean is over all samples."""
        sums, counts = torch.as_tensor(stats["sums"]), torch.as_tensor(stats["counts"])
        for c, total, count in zip(task.classes, sums, counts.tolist(), strict=True):
            if count:
                self.sums[c] = self.sums.get(c, 0.0) + total.cpu()
                self.counts[c] = self.counts.get(c, 0.0) + count

    def predict(self, learner: Learner, batch: Batch, task: Task | None) -> Tensor:
        """Cosines (n, classes); before any task what the network says."""
        if not self.sums:
            return learner(batch)
        f, known = learner.features(batch), [c for c in self.sums if not task or c in task.classes]
        means = torch.stack([self.sums[c] / self.counts[c] for c in known]).to(f)
        logits = f.new_full((len(f), max(self.sums) + 1), -torch.inf)
        logits[:, known] = F.normalize(f, dim=1) @ F.normalize(means, dim=1).t()
        return logits

    def state_dict(self) -> State:
        """Sums and counts."""
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])
