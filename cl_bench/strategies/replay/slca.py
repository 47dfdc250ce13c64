"""SLCA (Zhang et al., ICCV 2023; github.com/GengDavid/SLCA @ 169d4e6).

A slow learner: the whole network learns every task, below its heads at a rate of its own, by
cross-entropy over the task's classes; older heads stay. Then every class is remembered as a normal
distribution of features, with the mean m_c and the covariance S_c + 1e-4 I that it had when it was
learned.

Classifier alignment, from the second task on: all heads learn features drawn afresh in every epoch,

    f ~ N(gamma_c m_c, S_c + 1e-4 I),   gamma_c = 0.9 + 0.1 (t_c + 1) / (t + 1)

for class c of task t_c after task t, by the cross-entropy of z / (mean_i |z_i| tau), z_i being the
logits of task i. Aligned heads answer; the next task goes on from those before the alignment.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from cl_bench.contracts import (
    CLASSIFIED,
    Batch,
    Data,
    Learner,
    Loss,
    Needs,
    Phase,
    State,
    Statistics,
    Strategy,
    Task,
    UsageError,
    batch_sizes,
    generator,
)
from cl_bench.contracts.options import Count, Rate
from cl_bench.strategies.logits import Logits, cross_entropy, open_heads, require_rivals

RIDGE = 1e-4
"""Added to variances."""

SHRUNK = 0.1
"""By how much the mean of a class from long ago is shrunk, at most."""

LEAST = 1e-7
"""Added to the norms of logits."""


class Normal:
    """Classes as normal distributions.

    Attributes:
        means: (C, d) float64.
        covariances: (C, d, d) float64, ridge included.
        tasks: of each, where its classes begin and end.
    """

    def __init__(self) -> None:
        self.means = torch.zeros(0, 0, dtype=torch.float64)
        self.covariances = torch.zeros(0, 0, 0, dtype=torch.float64)
        self.tasks: list[tuple[int, int]] = []

    def add(self, task: Task, stats: Statistics) -> None:
        """The classes of a task, which end the ones that are known."""
        n, s, S = (torch.as_tensor(stats[k]).cpu() for k in ("counts", "sums", "squares"))
        if not bool((n > 0).all()):
            missing = task.classes.start + int((n == 0).nonzero()[0])
            raise UsageError(
                f"SLCA: class {missing} of task {task.name!r} has no training samples, so that its "
                "features have no distribution; leave the class out of the stream"
            )
        means = s / n[:, None]
        spread = S - n[:, None, None] * means[:, :, None] * means[:, None]
        ridge = RIDGE * torch.eye(s.shape[1], dtype=s.dtype)
        covariances = spread / (n - 1).clamp(min=1)[:, None, None] + ridge
        known = bool(self.tasks)
        self.means = torch.cat([self.means, means]) if known else means
        self.covariances = torch.cat([self.covariances, covariances]) if known else covariances
        self.tasks.append((task.classes.start, task.classes.stop))

    def draw(self, each: int, seed: int) -> Batch:
        """``each`` features float32 of every class, in order, and their classes ``y``."""
        drawn, latest = [], len(self.tasks)
        order = [c for start, stop in self.tasks for c in range(start, stop)]
        ages = [i for i, (start, stop) in enumerate(self.tasks) for _ in range(start, stop)]
        for i, (c, t) in enumerate(zip(order, ages, strict=True)):
            factor, failed = torch.linalg.cholesky_ex(self.covariances[i])
            if int(failed):
                raise UsageError(f"SLCA: the covariance of class {c} is not positive definite")
            gamma = 1 - SHRUNK + SHRUNK * (t + 1) / latest
            rng = generator(seed, "features", c)
            noise = torch.randn(each, len(factor), generator=rng, dtype=factor.dtype)
            drawn.append(gamma * self.means[i] + noise @ factor.t())
        y = torch.tensor(order).repeat_interleave(each)
        return {"features": torch.cat(drawn).float(), "y": y}


class Drawn(Data):
    """Features drawn from ``classes``, whatever these are when they are asked for.

    Args:
        classes: the distributions.
        count: how many classes there will be.
        each: features of a class.
        seed: of an epoch.
    """

    def __init__(self, classes: Normal, count: int, each: int, seed: int = 0) -> None:
        self.classes, self.count, self.each, self.seed = classes, count, each, seed
        self._all: Batch | None = None

    def __len__(self) -> int:
        return self.count * self.each

    def __getitem__(self, index: Tensor) -> Batch:
        if self._all is None:
            self._all = self.classes.draw(self.each, self.seed)
        found = {name: value[index] for name, value in self._all.items()}
        return {**found, "plain": found["features"]}

    def augmented(self, seed: int) -> "Drawn":
        """Others, of another epoch."""
        return Drawn(self.classes, self.count, self.each, seed)


class SLCA(Strategy):
    """Slow learning of the whole network, and heads aligned on features drawn by class.

    Args:
        rate: of what lies below the heads; heads have the run's.
        epochs: of the alignment.
        each: features of every class in each of them.
        align_rate: of the alignment.
        tau: temperature of the normalised logits.
        logits: which classes compete while a task is learned.

    Attributes:
        classes: distributions of all classes.
        raw: heads before the latest alignment, by name.
        learned: how many tasks are over.
    """

    needs = Needs(modalities=CLASSIFIED, scenarios=frozenset({"class", "task"}), shardable=False)

    def __init__(
        self,
        rate: Rate = 1e-4,
        epochs: Count = 5,
        each: Count = 256,
        align_rate: Rate = 0.01,
        tau: Rate = 0.1,
        logits: Logits = "current",
    ) -> None:
        self.rate, self.epochs, self.each = rate, epochs, each
        self.align_rate, self.tau, self.logits = align_rate, tau, logits
        self.classes = Normal()
        self.raw: dict[str, Tensor] = {}
        self.learned = 0
        self._classes: range | None = None

    def check(self, learner: Learner) -> None:
        """A class must have others to compete with."""
        require_rivals(learner, self.logits)

    def check_elsewhere(self, promised: bool = False) -> None:
        """Somebody else's loop gives the model inputs, and the alignment has features."""
        raise UsageError(
            "SLCA aligns heads on features that it draws, in cl_bench's own loop: "
            "python -m cl_bench +strategy=slca"
        )

    def setup(self, learner: Learner, task: Task) -> None:
        """Heads as they were before the alignment; those of older tasks stay."""
        heads = _heads(learner)
        with torch.no_grad():
            for name, value in self.raw.items():
                heads[name].copy_(value)
        learner.train_heads("current")
        open_heads(learner, self.logits, old=self.logits == "seen")
        self._classes = task.classes if self.logits == "current" else None

    def param_groups(self, learner: Learner) -> Iterable[dict[str, Any]]:
        """Two rates."""
        heads = set(_heads(learner).values())
        trained = learner.trainable_parameters()
        slow, fast = ([p for p in trained if (p in heads) == own] for own in (False, True))
        groups: list[dict[str, Any]] = [{"params": slow, "lr": self.rate}, {"params": fast}]
        return [group for group in groups if group["params"]]

    def objective(self, learner: Learner, batch: Batch, out: Tensor) -> Loss:
        """Cross-entropy over the classes that compete."""
        return cross_entropy(learner, out, batch, self._classes)

    def phases(self, learner: Learner, task: Task) -> list[Phase]:
        """The alignment, from the second task on."""
        if not self.learned:
            return []

        def prepare(learner: Learner) -> None:
            self.classes.add(task, self.collect(learner, task))
            self.raw = {name: p.detach().clone() for name, p in _heads(learner).items()}

        def groups(learner: Learner) -> list[dict[str, Any]]:
            learner.train_heads("seen")
            heads = [p for p in _heads(learner).values() if p.requires_grad]
            return [{"params": heads, "lr": self.align_rate}]

        known = sum(stop - start for start, stop in self.classes.tasks[: self.learned])
        data = Drawn(self.classes, known + len(task.classes), self.each)
        return [
            Phase(
                "align", data, self.epochs, groups, self.aligned, prepare=prepare, of_features=True
            )
        ]

    def aligned(self, learner: Learner, batch: Batch, out: Tensor) -> Loss:
        """Cross-entropy of logits over the mean norm of tasks' logits, and tau."""
        norms = [out[:, start:stop].norm(dim=1) + LEAST for start, stop in self.classes.tasks]
        logits = out / (torch.stack(norms).mean(0)[:, None] * self.tau)
        terms = F.cross_entropy(logits, batch["y"], reduction="none")
        return Loss(terms.double().sum(), len(out))

    @torch.no_grad()
    def collect(self, learner: Learner, task: Task) -> Statistics:
        """``counts`` (c,), ``sums`` (c, d) and ``squares`` (c, d, d) of features, in float64."""
        if len(self.classes.tasks) > self.learned:
            return {}
        data, least = task.train, learner.least_batch
        found: list[tuple[Tensor, Tensor]] = []
        with learner.evaluating():
            sizes = batch_sizes(len(data), learner.batch_size, least)
            for index in torch.split(torch.arange(len(data)), sizes):
                batch = data[index]
                found.append((learner.features(batch).double().cpu(), batch["y"].cpu()))
        f, y = (torch.cat(parts) for parts in zip(*found, strict=True))
        by_class = [f[y == c] for c in task.classes]
        return {
            "counts": torch.tensor([len(own) for own in by_class], dtype=f.dtype),
            "sums": torch.stack([own.sum(0) for own in by_class]),
            "squares": torch.stack([own.t() @ own for own in by_class]),
        }

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """The task's classes, unless the alignment has seen to them."""
        if stats:
            self.classes.add(task, stats)
        self.learned += 1

    def state_dict(self) -> State:
        """Distributions, and heads before the alignment."""
        return {
            "means": self.classes.means,
            "covariances": self.classes.covariances,
            "tasks": [list(task) for task in self.classes.tasks],
            "raw": dict(self.raw),
            "learned": self.learned,
        }

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.classes.means, self.classes.covariances = state["means"], state["covariances"]
        self.classes.tasks = [(start, stop) for start, stop in state["tasks"]]
        self.raw, self.learned = dict(state["raw"]), state["learned"]


def _heads(learner: Learner) -> Mapping[str, Tensor]:
    roles = learner.roles()
    return {n: p for n, p in learner.network.named_parameters() if roles[n] == "head"}
