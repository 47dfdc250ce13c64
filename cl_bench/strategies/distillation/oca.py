"""Orthogonal compatible alignment (repository OCA @ af89d7d): new features that old galleries know.

With h the network's features and b its first d_old, the loss is

    5 CE(W Q h) + 10 CE(norm(b) P^T) + 5 (1 - cos(norm(b), P_y)),

W the heads, Q square and orthogonal, and P the class means of the *old* network's normalised
features over the new task's data. Q preserves all cosines: it frees the heads from the axes that b
is tied to, and nothing else. b is taken before Q, which has no bias here (theirs has one, which
makes it affine). Theirs widens the network by k dimensions for what is new; here the network's
width is given, and ``compatible`` is the share of it that b holds. Weights and label smoothing are
those of their code, which ignores its own configuration.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from cl_bench.contracts import CLASSIFIED, Batch, Learner, Loss, Needs, State, Strategy, Task
from cl_bench.contracts.options import PartShare, SomeShare, Strength
from cl_bench.strategies.replay.buffer import in_pieces


class OCA(Strategy):
    """Ties a part of the features to what the network before the task said of the task's classes.

    Args:
        compatible: share of the features that stay comparable.
        classify: weight of the cross-entropy.
        match: of the cross-entropy against the old class means.
        align: of the cosine to a sample's own class mean.
        smoothing: of labels in both cross-entropies.
    """

    needs = Needs(modalities=CLASSIFIED, shardable=False)

    def __init__(
        self,
        compatible: SomeShare = 0.8,
        classify: Strength = 5.0,
        match: Strength = 10.0,
        align: Strength = 5.0,
        smoothing: PartShare = 0.1,
    ) -> None:
        self.compatible, self.smoothing = compatible, smoothing
        self.classify, self.match, self.align = classify, match, align
        self.old: Tensor | None = None  # P (classes of the task, d_old)
        self.first_class = 0
        self.width = 0

    def modules(self, learner: Learner) -> Mapping[str, nn.Module]:
        """Q, the identity at first."""
        if not self.width:
            return {}
        rotation = nn.Linear(self.width, self.width, bias=False)
        with torch.no_grad():
            rotation.weight.copy_(torch.eye(self.width))
        return {"rotation": orthogonal(rotation, orthogonal_map="cayley")}

    @torch.no_grad()
    def setup(self, learner: Learner, task: Task) -> None:
        """P of the network as it is now; the first task has no old one."""
        with learner.evaluating():
            found = [
                (F.normalize(self._old_part(learner.features(batch)), dim=1).cpu(), batch["y"])
                for batch in in_pieces(task.train, 1000)
            ]
        features, labels = (torch.cat(values) for values in zip(*found, strict=True))
        self.first_class = task.classes.start
        if task.index == 0:
            return
        one = F.one_hot(labels.cpu() - self.first_class, len(task.classes)).to(features)
        self.old = one.t() @ features / one.sum(0)[:, None].clamp(min=1)

    def _old_part(self, features: Tensor) -> Tensor:
        self.width = features.shape[1]
        return features[:, : max(1, round(self.compatible * self.width))]

    def _rotated(self, learner: Learner, features: Tensor) -> Tensor:
        rotated: Tensor = learner.extras(self)["rotation"](features)
        return rotated

    def objective(self, learner: Learner, batch: Batch, out: Tensor) -> Loss:
        """The three terms, summed over samples."""
        features, y = learner.features(batch), batch["y"]
        logits = self._masked(learner.readout(self._rotated(learner, features)), out)
        smooth = 0.0 if logits.isinf().any() else self.smoothing
        loss = self.classify * F.cross_entropy(logits, y, reduction="none", label_smoothing=smooth)
        if self.old is not None:
            old, own = self.old.to(features), y - self.first_class
            b = F.normalize(self._old_part(features), dim=1)
            matched = F.cross_entropy(
                b @ old.t(), own, reduction="none", label_smoothing=self.smoothing
            )
            cosine = F.cosine_similarity(b, old[own], dim=1)
            loss = loss + self.match * matched + self.align * (1 - cosine)
        return Loss(loss.double().sum(), len(loss))

    @staticmethod
    def _masked(logits: Tensor, out: Tensor) -> Tensor:
        """Logits without the classes that the network's own outputs leave out."""
        return logits.masked_fill(out[:, : logits.shape[1]] == -torch.inf, -torch.inf)

    @property
    def passes(self) -> int:
        """Q h beside what the network says, once there is a Q."""
        return 2 if self.width else 1

    def predict(self, learner: Learner, batch: Batch, task: Task | None) -> Tensor:
        """W Q h; before any task what the network says."""
        out = learner(batch)
        if not self.width:
            return out
        return self._masked(learner.readout(self._rotated(learner, learner.features(batch))), out)

    def state_dict(self) -> State:
        """How wide Q is, and P."""
        return {"width": self.width, "old": self.old, "first_class": self.first_class}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.width, self.old = state["width"], state["old"]
        self.first_class = state["first_class"]
