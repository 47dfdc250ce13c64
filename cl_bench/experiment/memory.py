"""The memory that a run will take, added up before anything is loaded: planned, not measured.

The network may lie on torch's meta device: only shapes and dtypes count.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from cl_bench.contracts import Memory, Strategy
from cl_bench.experiment.activations import Activations
from cl_bench.experiment.checkpoint import CheckpointSettings
from cl_bench.experiment.disk import states
from cl_bench.learners import BaseLearner

PHASES = ("start", "training", "stepping", "boundary", "evaluation", "checkpoint")
"""Of a run; what is held in each of them counts, and the largest is the peak."""
STEPPED = ("training", "stepping", "boundary", "checkpoint")
"""Those in which there is an optimizer."""


@dataclass(frozen=True)
class Layout:
    """How a run lies on machines.

    Attributes:
        processes: that train together, one a device.
        here: of them on one host.
        sharded: whether they share the weights out.
        on_device: whether devices have a memory of their own.
        casts: whether weights are cast to half precision for each forward pass.
    """

    processes: int = 1
    here: int = 1
    sharded: bool = False
    on_device: bool = False
    casts: bool = False

    @property
    def parts(self) -> int:
        """Of each weight."""
        return self.processes if self.sharded else 1

    def part(self, tensor: Tensor) -> int:
        """Bytes of the largest part of a parameter that a process holds."""
        if self.parts == 1 or tensor.dim() == 0:
            return size(tensor)
        rows = math.ceil(tensor.shape[0] / self.parts)
        return rows * math.prod(tensor.shape[1:]) * tensor.element_size()


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes, by what they are for and phase.

    Attributes:
        device: of the process that holds most: ``{what: {phase: bytes}}``.
        host: of one host's memory beside that of devices.
        layout: of the run.
        unknown: what could not be told, in words.
    """

    device: Mapping[str, Mapping[str, int]]
    host: Mapping[str, int]
    layout: Layout
    unknown: tuple[str, ...] = ()

    def total(self, phase: str) -> int:
        """Of one process in a phase."""
        return sum(row.get(phase, 0) for row in self.device.values())

    @property
    def peak(self) -> int:
        """The most that one process holds."""
        return max(map(self.total, PHASES))

    @property
    def host_total(self) -> int:
        """What a host holds; where devices have no memory of their own, theirs too."""
        own = 0 if self.layout.on_device else self.layout.here * self.peak
        return own + sum(self.host.values())


def plan_memory(
    learner: BaseLearner,
    strategy: Strategy,
    layout: Layout,
    activations: Activations,
    checkpoint: CheckpointSettings,
    tasks: int,
    watched: bool,
) -> MemoryPlan:
    """What a run will hold.

    Args:
        learner: what learns; its network may be on the meta device.
        strategy: which says what it takes itself.
        layout: of processes.
        activations: of one process's part of a batch.
        checkpoint: how the run is saved.
        tasks: how many are learned.
        watched: whether alignment is.
    """
    told = strategy.footprint(learner, tasks, layout.parts)
    own = told or Memory()
    named = dict(learner.network.named_parameters())
    weights = sum(map(layout.part, named.values())) + _buffers(learner)
    whole = sum(map(size, named.values())) + _buffers(learner)
    trained = {n: p for n, p in named.items() if learner.learns(p) and n not in own.frozen}
    stepped = [p for n, p in trained.items() if n not in own.unstepped]
    gradients = sum(map(layout.part, trained.values()))
    number = states(learner._optimizer_factory)
    optimizer = int(number * (sum(map(layout.part, stepped)) + own.trained))
    always = dict.fromkeys(PHASES, weights)
    gathers = watched or any(member.needs.gathers for member in strategy.members)
    kept = dict.fromkeys((*STEPPED, "evaluation"), own.kept)
    rows: dict[str, dict[str, int]] = {
        "weights": always,
        "weights put together": _together(learner, trained, layout, gathers),
        "gradients": dict.fromkeys(("training", "stepping", "checkpoint"), gradients + own.trained),
        "optimizer": dict.fromkeys(STEPPED, optimizer),
        "strategy": {
            **kept,
            "training": own.kept + own.trained,
            "stepping": own.kept + own.trained + own.stepping,
            "boundary": own.kept + own.trained + own.boundary,
            "checkpoint": own.kept + own.trained,
        },
        "activations (estimated)": {
            "training": activations.training,
            "evaluation": activations.evaluation,
        },
        "alignment": _watching(learner, layout) if watched else {},
    }
    unknown = [*activations.unknown]
    if told is None:
        names = [
            type(m).__name__ for m in strategy.members if m.footprint(learner, tasks, 1) is None
        ]
        unknown.append(f"{' and '.join(names)} does not say what it keeps: strategy is a lower end")
    largest = max(map(size, named.values()), default=0)
    # Of where the task began, with what is saved inside it; rows go to files as they are.
    held = layout.parts * own.saved_between + (0 if layout.sharded else whole)
    inside = int(number * own.trained) * layout.parts + own.saved_inside * (layout.parts - 1)
    saved = held + inside * bool(checkpoint.every_steps) + whole * (checkpoint.weights == "all")
    held, saved = held * checkpoint.enabled, saved * checkpoint.enabled
    host: dict[str, int] = {}
    if not layout.sharded:
        rows["checkpoints"] = dict.fromkeys(PHASES, held)
        if layout.on_device:
            host["start weights"] = layout.here * whole
        else:
            rows["start weights"] = dict.fromkeys(PHASES, whole)
    else:
        rows["start weights"] = dict.fromkeys(PHASES, weights)
        if layout.on_device:
            rows["checkpoints"] = {"checkpoint": largest * checkpoint.enabled}
            host["checkpoints, in process 0"] = saved
            host["start of process 0, before weights are shared out"] = 2 * whole
        else:  # of process 0, which writes
            rows["checkpoints"] = {**dict.fromkeys(PHASES, held), "checkpoint": saved}
            rows["before weights are shared out"] = {"start": max(0, 2 * whole - 2 * weights)}
    if layout.processes > 1:
        host["the starting process"] = 2 * whole
    rows = {what: {p: n for p, n in row.items() if n} for what, row in rows.items()}
    return MemoryPlan({k: row for k, row in rows.items() if row}, host, layout, tuple(unknown))


def _together(
    learner: BaseLearner, trained: Mapping[str, nn.Parameter], layout: Layout, gathers: bool
) -> dict[str, int]:
    """What of the weights is put together, and cast, for a pass; all for those who ``gathers``."""
    matrices = sum(p.numel() for p in learner.network.parameters() if p.dim() > 1)
    if layout.parts == 1:
        casts = 2 * matrices if layout.casts else 0  # autocast keeps what it has cast
        reduced = sum(map(size, trained.values())) if layout.processes > 1 else 0  # DDP's buckets
        return {"training": reduced + casts, "evaluation": casts}
    ids = {id(p) for p in trained.values()}

    def opened(parameters: Iterable[Tensor], learned: bool = True) -> int:
        found = list(parameters)
        width = [2 if layout.casts else p.element_size() for p in found]
        back = [learned and id(p) in ids for p in found]  # with its gradient
        return sum(p.numel() * w * (1 + b) for p, w, b in zip(found, width, back, strict=True))

    inside = {id(p) for block in learner.blocks() for p in block.parameters()}
    outside = [p for p in learner.network.parameters() if id(p) not in inside]
    blocks = [list(block.parameters()) for block in learner.blocks()]
    one = max(map(opened, blocks), default=0)
    following = max((opened(b, False) for b in blocks), default=0)  # it is under way
    read = opened(outside, False) + 2 * following
    most = opened(learner.network.parameters(), False) if gathers else read
    training = opened(outside) + one + following
    return {"training": training, "evaluation": read, "boundary": most}


def _watching(learner: BaseLearner, layout: Layout) -> dict[str, int]:
    """The observer of alignment: weights from before the task, bases, and second moments."""
    from cl_bench.contracts import Protect

    layers = learner.layers(Protect(bias="free"))
    before = sum(m.in_features * m.out_features * m.weight.element_size() for m in layers)
    bases = sum(4 * m.in_features**2 for m in layers)  # float64, half of all directions
    moments = sum(8 * m.in_features**2 for m in layers)
    return {**dict.fromkeys(PHASES, before + bases), "boundary": before + bases + moments}


def _buffers(learner: BaseLearner) -> int:
    return sum(map(size, learner.network.buffers()))


def size(tensor: Tensor) -> int:
    """Bytes."""
    return tensor.numel() * tensor.element_size()
