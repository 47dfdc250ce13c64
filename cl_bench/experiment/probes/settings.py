"""What probes have in common: options that make what watches, and what that may look at."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from cl_bench.contracts import Stream, UsageError
from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import Index, OnlyWith
from cl_bench.experiment.observer import Observer
from cl_bench.experiment.probes.clock import Clock
from cl_bench.learners import BaseLearner
from cl_bench.tracking import Record

ENABLED = OnlyWith("enabled", (True,))
"""Marks an option of a probe, which does nothing while the probe is off."""


@dataclass(frozen=True)
class Scene:
    """What a probe may look at, and where it writes.

    Attributes:
        stream: whose tasks are learned.
        learner: what learns them.
        record: keeps what is found.
        clock: where training stands.
        early: first and last step of the early phase of a task; what follows is the late one.
        seed: of what is drawn.
        batch_size: samples of a training batch.
        eval_batch_size: samples of a batch that is scored.
    """

    stream: Stream
    learner: BaseLearner
    record: Record
    clock: Clock
    early: tuple[int, int]
    seed: int
    batch_size: int
    eval_batch_size: int


class Probe:
    """The options of something to measure, off unless it is asked for.

    A subclass is a frozen dataclass under ``checked("probe.<name>.")``; its fields are the keys of
    ``conf/probe/<name>.yaml``, and ``enabled`` is the first.

    Attributes:
        enabled: measure it.
        writes: whether it writes to the network on the side, and puts back what was there.
    """

    enabled: bool
    writes: ClassVar[bool] = False

    def observer(self, scene: Scene) -> Observer:
        """What watches.

        Raises:
            UsageError: there is nothing to measure in this scene.
        """
        raise NotImplementedError


@checked("probe.")
class ProbeSettings:
    """All of them.

    Args:
        early: steps of a task between which its early phase lies; what follows is the late one.
        members: probes by name, in the order in which they measure.
    """

    def __init__(self, early: Sequence[Index] = (0, 40), **members: Probe) -> None:
        if len(early) != 2 or early[0] >= early[1]:
            raise UsageError(f"probe.early={list(early)}: first and last step, such as [0, 40]")
        self.early = (early[0], early[1])
        self.members = members
