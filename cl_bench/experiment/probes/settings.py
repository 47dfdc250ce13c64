"""What is probed, and how much that may cost. Everything is off unless it is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from cl_bench.contracts import UsageError
from cl_bench.experiment.steps import steps_of


@dataclass(frozen=True)
class UpdateSettings:
    """Angles between the weight updates of two phases.

    Attributes:
        enabled: measure them.
        energy: share of an update's squared norm that its principal subspace holds.
        standardise: as the authors' code does; for comparisons with their numbers only.
    """

    enabled: bool = False
    energy: float = 0.99
    standardise: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.energy <= 1.0:
            raise UsageError(f"probe.updates.energy={self.energy}: a share in (0, 1]; try 0.99")


@dataclass(frozen=True)
class FeatureSettings:
    """Drift of hidden states on fixed samples of old tasks.

    Attributes:
        enabled: measure it.
        samples: training samples of each old task.
        components: k, principal components that the shift is compared with.
    """

    enabled: bool = False
    samples: int = 200
    components: int = 5

    def __post_init__(self) -> None:
        for key, least in (("samples", 2), ("components", 1)):
            if getattr(self, key) < least:
                raise UsageError(f"probe.features.{key}={getattr(self, key)}: at least {least}")


@dataclass(frozen=True)
class RecoverySettings:
    """Learning one half of an old task anew, to see what of the other half is still known.

    Attributes:
        enabled: do it after every task, for every task learned so far.
        steps: optimizer steps, from a fresh optimizer of the run's kind.
        rate: times ``optimizer.lr``; None takes the recovered task's own.
        samples: of the half that is scored, and of the control; None means all.
        at: steps of a task after which it is done as well, for old tasks.
    """

    enabled: bool = False
    steps: int = 50
    rate: float | None = None
    samples: int | None = 1000
    at: Sequence[int] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "at", steps_of("probe.recovery.at", self.at))
        if self.steps < 0 or (self.rate is not None and self.rate <= 0):
            raise UsageError(
                f"probe.recovery.steps={self.steps}, probe.recovery.rate={self.rate}: steps count "
                "from 0, a rate is positive or null"
            )
        if self.samples is not None and self.samples < 1:
            raise UsageError(f"probe.recovery.samples={self.samples}: at least 1, or null for all")


@dataclass(frozen=True)
class LandscapeSettings:
    """Losses of old and new task on the plane through three sets of weights of the new task.

    Attributes:
        enabled: measure them.
        samples: training samples of each task.
        along_early: first and last place, and number of places, in the early phase's direction.
        along_late: the same in the late phase's direction.
    """

    enabled: bool = False
    samples: int = 200
    along_early: Sequence[float] = (-1.0, 2.5, 15)
    along_late: Sequence[float] = (-1.0, 2.0, 13)

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UsageError(f"probe.landscape.samples={self.samples}: at least 1")
        for key in ("along_early", "along_late"):
            places = list(getattr(self, key))
            right = len(places) == 3 and places[0] < places[1] and places[2] >= 2
            if not right or places[2] != int(places[2]):
                raise UsageError(
                    f"probe.landscape.{key}={places}: first place, last place, number of places; "
                    "try [-1, 2, 13]"
                )


@dataclass(frozen=True)
class ProbeSettings:
    """All of them.

    Attributes:
        early: steps of a task between which its early phase lies; what follows is the late one.
        updates, features, recovery, landscape: see there.
    """

    early: Sequence[int] = (0, 40)
    updates: UpdateSettings = field(default_factory=UpdateSettings)
    features: FeatureSettings = field(default_factory=FeatureSettings)
    recovery: RecoverySettings = field(default_factory=RecoverySettings)
    landscape: LandscapeSettings = field(default_factory=LandscapeSettings)

    def __post_init__(self) -> None:
        early = list(self.early)
        if len(early) != 2 or not 0 <= early[0] < early[1]:
            raise UsageError(f"probe.early={early}: first and last step, such as [0, 40]")
        object.__setattr__(self, "early", tuple(early))
