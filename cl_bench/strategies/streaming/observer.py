"""What learners that observe a stream have in common: scales, one-hot labels, answers."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from cl_bench.contracts import CLASSIFIED, Batch, Learner, Needs, State, Strategy, Task


class StreamLearner(Strategy):
    """Learns what the network's features say; the network itself keeps its first weights.

    Features are shifted and scaled by the mean and the deviation (+ .01, as Lite-RVFL's code does)
    of the first batch that is observed, ``engine.warmup`` samples.

    Attributes:
        classes: labels met so far lie below it.
        shift, scale: of features (d,); None until something was observed.
    """

    needs = Needs(engines=frozenset({"streaming"}), modalities=CLASSIFIED, first_batch=2)

    def __init__(self) -> None:
        self.classes = 0
        self.shift: Tensor | None = None
        self.scale: Tensor | None = None

    def setup(self, learner: Learner, task: Task) -> None:
        """Nothing of the network trains; more classes may come."""
        learner.hold([learner.network])
        if task.classes.stop > self.classes:
            self.grow(task.classes.stop)
            self.classes = task.classes.stop

    def grow(self, classes: int) -> None:
        """There will be so many classes, more than before."""

    def begin(self, x: Tensor, seed: int) -> None:
        """Features (n, d) of the first batch, scaled: make what depends on how many there are."""

    def learn(self, x: Tensor, y: Tensor) -> None:
        """Scaled features (n, d) and one-hot labels (n, classes), in double precision."""
        raise NotImplementedError

    def answers(self, x: Tensor) -> Tensor:
        """Scores (n, classes) of scaled features (n, d)."""
        raise NotImplementedError

    @torch.no_grad()
    def observe(self, learner: Learner, batch: Batch) -> bool:
        """Learn a batch, the first sample first."""
        x, y = learner.features(batch).double().cpu(), batch["y"].cpu()
        first = self.shift is None
        if first:
            self.shift, self.scale = x.mean(0), x.std(0) + 0.01
        scaled = self._scaled(x)
        if first:
            self.begin(scaled, learner.seed)
        self.learn(scaled, F.one_hot(y, self.classes).double())
        return True

    def _scaled(self, x: Tensor) -> Tensor:
        assert self.shift is not None
        assert self.scale is not None
        return (x - self.shift) / self.scale

    @torch.no_grad()
    def predict(self, learner: Learner, batch: Batch, task: Task | None) -> Tensor:
        """Scores; before anything was observed what the network says."""
        if self.shift is None:
            return learner(batch)
        features = learner.features(batch)
        out = self.answers(self._scaled(features.double().cpu())).to(features)
        if task is None:
            return out
        own = torch.zeros(self.classes, dtype=torch.bool, device=out.device)
        own[task.classes.start : task.classes.stop] = True
        return out.masked_fill(~own, -torch.inf)

    def memory(self) -> Mapping[str, Any]:
        """What a subclass remembers; None before it has begun."""
        raise NotImplementedError

    def remember(self, memory: Mapping[str, Any]) -> None:
        """Inverse of :meth:`memory`."""
        raise NotImplementedError

    def state_dict(self) -> State:
        """Scales, classes, and what the subclass remembers once it has begun."""
        begun = self.shift is not None
        return {
            "classes": self.classes,
            "shift": self.shift,
            "scale": self.scale,
            "memory": dict(self.memory()) if begun else None,
        }

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.classes, self.shift, self.scale = state["classes"], state["shift"], state["scale"]
        if state["memory"] is not None:
            self.remember(state["memory"])
