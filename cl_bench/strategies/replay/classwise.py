"""What learns each task together with the same number of samples of every old class has in common.

Where a task begins, a copy of the network is there to distil from (:attr:`Classwise.teacher`).
"""

from typing import Literal

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
    Plan,
    State,
    Statistics,
    Strategy,
    Stream,
    Task,
    UsageError,
    generator,
    likewise,
)
from cl_bench.contracts.learner import Snapshot
from cl_bench.strategies.baselines.joint import Union
from cl_bench.strategies.logits import cross_entropy, distillation
from cl_bench.strategies.replay.buffer import (
    Exemplars,
    Part,
    herd,
    in_pieces,
    labels_of,
    rows_by_class,
    size,
)

Select = Literal["herding", "random"]


class Classwise(Strategy):
    """Keeps samples of every class, and learns tasks together with them.

    Args:
        memory: samples kept, over all classes.
        select: which of a class: those whose mean follows that of all, by normalised features, or
            any.

    Attributes:
        kept: the samples.
        old, seen: how many classes came with earlier tasks, and with the task as well.
        teacher: the network before the task; None in the first, and between tasks.
        seed: of the run.
        temperature, squared: of :meth:`weighed`.
    """

    temperature = 2.0
    squared = False

    needs = Needs(modalities=CLASSIFIED, scenarios=frozenset({"class"}), shardable=False)
    least = 1
    """Samples of a class that the method cannot do without."""

    def __init__(self, memory: int, select: Select) -> None:
        self.kept = Exemplars(memory)
        self.select = select
        self.seed = 0
        self.old = self.seen = 0
        self.teacher: Snapshot | None = None

    @property
    def exemplars(self) -> int:
        """Samples of all classes."""
        return len(self.kept)

    def check(self, learner: Learner) -> None:
        """Take the seed down: plans are made where no learner is at hand."""
        self.seed = learner.seed

    def require_room(self, stream: Stream) -> None:
        """Raise :class:`UsageError` if the memory is too small for the stream's classes."""
        classes = max(task.classes.stop for task in stream)
        if self.kept.quota(classes) < self.least:
            raise UsageError(
                f"strategy.memory={self.kept.memory}: stream {stream.name!r} has {classes} classes "
                f"and each needs {self.least} of the samples; at least {self.least * classes}"
            )

    def plan(self, stream: Stream, t: int) -> Plan:
        """The task's samples and those that are kept.

        Raises:
            UsageError: the memory is too small.
        """
        self.require_room(stream)
        return Plan(joined(stream[t].train, self.kept.batch()))

    def parted(self, task: Task, share: float) -> tuple[Data, Data | None]:
        """What :meth:`plan` gives but for some samples, as many of every class; and these.

        So many are a ``share`` of an old class's. In the first task there are none.
        """
        if not self.kept.classes:
            return task.train, None
        kept = self.kept.batch()
        fewest = min(map(size, self.kept.classes.values()))
        count = max(1, min(round(share * fewest), fewest - 1))
        new = shuffled(rows_by_class(labels_of(task), task.classes), self.seed, task)
        old = shuffled(rows_by_class(kept["y"], self.kept.classes), self.seed, task)
        aside, rest = (
            [torch.cat([own[cut] for own in rows.values()]) for rows in (new, old)]
            for cut in (slice(count), slice(count, None))
        )
        second = {k: torch.cat([v, kept[k][aside[1]]]) for k, v in task.train[aside[0]].items()}
        learned = {k: v[rest[1]] for k, v in kept.items()}
        return joined(Part(task.train, rest[0].sort().values), learned), Part(second)

    def setup(self, learner: Learner, task: Task) -> None:
        """The network as it is now is the one to distil from."""
        self.old, self.seen = task.classes.start, task.classes.stop
        self.teacher = learner.snapshot() if self.old else None

    def weighed(self, learner: Learner, batch: Batch, out: Tensor, said: Tensor | None) -> Loss:
        """(1 - l) CE + l KD over what the teacher ``said`` of old classes, l their share of all."""
        found = cross_entropy(learner, out, batch, None)
        if said is None:
            return found
        terms = distillation(out[:, : self.old], said, self.temperature, self.squared)
        share = self.old / self.seen
        return Loss((1 - share) * found.sum + share * terms.double().sum(), found.count)

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """Samples of the new classes join, and old classes make room."""
        self.kept.take(task.train, self.choose(learner, task))

    def choose(self, learner: Learner, task: Task) -> dict[int, Tensor]:
        """Rows of the task's samples by class, the most wanted first."""
        found = rows_by_class(labels_of(task), task.classes)
        if self.select == "random":
            return shuffled(found, self.seed, task)
        quota = self.kept.quota(task.classes.stop)
        features = torch.cat(
            [normalised(learner, b).cpu() for b in in_pieces(task.train, learner.batch_size)]
        )
        return {c: rows[herd(features[rows], quota)] for c, rows in found.items()}

    def release(self, learner: Learner) -> None:
        """The copy is of no use any more."""
        self.teacher = None

    def state_dict(self) -> State:
        """What is kept."""
        return self.kept.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.kept.load_state_dict(state)


def joined(data: Data, kept: Batch) -> Data:
    """``data`` and what is kept, which training augments likewise."""
    return Union([data, likewise(data, Part(kept))]) if kept else data


def shuffled(rows: dict[int, Tensor], seed: int, task: Task) -> dict[int, Tensor]:
    """The rows of every class in an order drawn for the task."""
    rng = generator(seed, "exemplars", task.index)
    return {c: own[torch.randperm(len(own), generator=rng)] for c, own in rows.items()}


@torch.no_grad()
def normalised(learner: Learner, batch: Batch) -> Tensor:
    """Features (n, d) of length 1, in evaluation mode."""
    with learner.evaluating():
        return F.normalize(learner.features(batch).double(), dim=1)
