"""Angles between the weight updates of pre-training, tasks, and their early and late phases."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor, nn

from cl_bench.contracts import Protect, State, Task
from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import SomeShare
from cl_bench.experiment.observer import Observer
from cl_bench.experiment.probes.settings import ENABLED, Probe, Scene
from cl_bench.learners import BaseLearner
from cl_bench.learners.protection import EXTRA
from cl_bench.metrics import compare_subspaces, flat_cosine, principal_subspace, relative_change

PAIRS = (
    ("pretraining", "task"),
    ("previous", "task"),
    ("previous", "early"),
    ("early", "late"),
)
"""Phases whose updates are compared: the first one's subspace with the second one's directions."""

Matrices = dict[str, Tensor]


@checked("probe.updates.")
@dataclass(frozen=True)
class UpdateSettings(Probe):
    """Angles between the weight updates of two phases.

    Attributes:
        enabled: measure them.
        energy: share of an update's squared norm that its principal subspace holds.
        standardise: as the authors' code does; for comparisons with their numbers only.
    """

    enabled: bool = False
    energy: Annotated[SomeShare, ENABLED] = 0.99
    standardise: Annotated[bool, ENABLED] = False

    def observer(self, scene: Scene) -> Observer:
        """What watches."""
        return UpdateAngles(self, scene.early)


class UpdateAngles(Observer):
    """Compares phases layer by layer, embeddings included.

    Quantities, after a task: ``wupd/<one>-<other>/<quantity>`` as in
    :func:`cl_bench.metrics.compare_subspaces` with ``cos_flat``, and ``wupd/<phase>/rel_norm``, the
    size of the phase's update relative to the weights it began at.

    Args:
        settings: of the measurement.
        early: first and last step of the early phase.
    """

    def __init__(self, settings: UpdateSettings, early: Sequence[int]) -> None:
        self.settings = settings
        self.first, self.last = early
        self.steps = frozenset(n for n in early if n > 0)
        self._constructed: Matrices = {}
        self._pretraining: Matrices = {}
        self.previous: Matrices = {}
        self.marks: dict[str, Matrices] = {}

    def before_pretraining(self, learner: BaseLearner) -> None:
        """Remember where weights began."""
        self._constructed = matrices(learner)

    def after_pretraining(self, learner: BaseLearner) -> None:
        """Pre-training's update; no checkpoint holds it, since it is found again on resuming."""
        self._pretraining = _change(self._constructed, matrices(learner))
        self._constructed = {}

    def before_task(self, learner: BaseLearner, task: Task) -> None:
        """Remember the weights."""
        self.marks = {"start": matrices(learner)}
        if self.first == 0:
            self.marks["first"] = self.marks["start"]

    def after_step(self, learner: BaseLearner, task: Task, step: int, rate: float) -> None:
        """Remember the weights where the early phase begins and ends."""
        self.marks["first" if step == self.first else "last"] = matrices(learner)

    def after_task(self, learner: BaseLearner, task: Task) -> Mapping[str, Mapping[str, float]]:
        """Compare."""
        end = matrices(learner)
        began = {"task": self.marks["start"]}
        phases = {"task": _change(began["task"], end)}
        if "first" in self.marks and "last" in self.marks:
            began |= {"early": self.marks["first"], "late": self.marks["last"]}
            phases["early"] = _change(began["early"], began["late"])
            phases["late"] = _change(began["late"], end)
        updates = {"pretraining": self._pretraining, "previous": self.previous, **phases}
        found = {name: self._compare(name, updates) for name in end}
        for phase, weights in began.items():
            after = {"task": end, "late": end}.get(phase) or began["late"]
            for name, values in found.items():
                change = relative_change(weights[name], after[name])
                values[f"wupd/{phase}/rel_norm"] = change
        self.previous, self.marks = phases["task"], {}
        return found

    def _compare(self, name: str, updates: Mapping[str, Matrices]) -> dict[str, float]:
        s = self.settings
        bases = {
            phase: principal_subspace(found[name], s.energy, s.standardise)
            for phase, found in updates.items()
            if name in found
        }
        values: dict[str, float] = {}
        for one, other in PAIRS:
            if one not in bases or other not in bases:
                continue
            pair = compare_subspaces(bases[one], bases[other])
            pair["cos_flat"] = flat_cosine(updates[one][name], updates[other][name])
            values |= {f"wupd/{one}-{other}/{key}": value for key, value in pair.items()}
        return values

    def state_dict(self) -> State:
        """The last task's update, and inside a task the weights that its phases began at."""
        return {
            "previous": dict(self.previous),
            "marks": {k: dict(v) for k, v in self.marks.items()},
        }

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.previous = dict(state["previous"])
        self.marks = {k: dict(v) for k, v in state["marks"].items()}


def matrices(learner: BaseLearner) -> Matrices:
    """Copies of all weights that act as matrices, (m, n) with m the space that is compared.

    That is the output space of linear layers and convolutions, and the feature space of embeddings
    and of output layers, whose other side counts tokens or classes.
    """
    found: Matrices = {}
    for layer in learner.layers(Protect(bias="free")):
        matrix = layer.merged()
        is_head = learner.is_guarded_head(layer.name, "always") is not None
        found[layer.name] = _copy(matrix.t() if is_head else matrix)
    for name, module in learner.network.named_modules():
        if isinstance(module, nn.Embedding) and not name.startswith(EXTRA):
            found[name] = _copy(module.weight.detach().t())
    return found


def _copy(matrix: Tensor) -> Tensor:
    return matrix.cpu().contiguous().clone()


def _change(before: Matrices, after: Matrices) -> Matrices:
    return {name: after[name] - weight for name, weight in before.items()}
