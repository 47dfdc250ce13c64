"""What is probed, and how much that may cost. Everything is off unless it is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

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
class UnprotectedSettings:
    """How much of a task's update lies where keeping large singular directions protects nothing.

    Attributes:
        enabled: measure it.
        preserve_ratio: share of a weight's singular directions that count as preserved.
    """

    enabled: bool = False
    preserve_ratio: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 < self.preserve_ratio < 1.0:
            raise UsageError(
                f"probe.unprotected.preserve_ratio={self.preserve_ratio}: a share in (0, 1); "
                "try 0.5"
            )


@dataclass(frozen=True)
class GeneralTextSettings:
    """Loss of a language model on text that no task teaches, before and after every task.

    Attributes:
        enabled: measure it.
        path: a file that ends in ``.txt``, ``.jsonl`` or ``.jsonl.gz``.
        dataset: a data set on the Hugging Face hub. With neither, a dozen paragraphs that come with
            the package: enough to see damage, no benchmark.
        subset: of the data set.
        split: of the data set; one that nothing was trained on.
        field: member of a line, or column, that holds the text.
        windows: most pieces of text.
        length: tokens of each.
        objective: ``continuation`` (a causal model is given one token of a window, an
            encoder-decoder half of them), ``span_corruption`` (T5's pre-training), or ``auto``: the
            latter for an encoder-decoder whose tokenizer has the tokens that it takes.
    """

    enabled: bool = False
    path: str | None = None
    dataset: str | None = None
    subset: str | None = None
    split: str = "test"
    field: str = "text"
    windows: int = 64
    length: int = 128
    objective: Literal["auto", "continuation", "span_corruption"] = "auto"

    def __post_init__(self) -> None:
        if self.path is not None and self.dataset is not None:
            raise UsageError(
                f"probe.general_text.path={self.path} and probe.general_text.dataset="
                f"{self.dataset}: give one of them"
            )
        for key, least in (("windows", 1), ("length", 8)):
            if getattr(self, key) < least:
                raise UsageError(f"probe.general_text.{key}={getattr(self, key)}: at least {least}")
        if self.objective not in ("auto", "continuation", "span_corruption"):
            raise UsageError(
                f"probe.general_text.objective={self.objective!r}: use 'auto', 'continuation' or "
                "'span_corruption'"
            )

    @property
    def source(self) -> str:
        """Where the text comes from, for the record."""
        if self.dataset is not None:
            return "/".join(x for x in (self.dataset, self.subset, self.split) if x)
        return self.path or "cl_bench"


@dataclass(frozen=True)
class ProbeSettings:
    """All of them.

    Attributes:
        early: steps of a task between which its early phase lies; what follows is the late one.
        updates, features, recovery, landscape, unprotected, general_text: see there.
    """

    early: Sequence[int] = (0, 40)
    updates: UpdateSettings = field(default_factory=UpdateSettings)
    features: FeatureSettings = field(default_factory=FeatureSettings)
    recovery: RecoverySettings = field(default_factory=RecoverySettings)
    landscape: LandscapeSettings = field(default_factory=LandscapeSettings)
    unprotected: UnprotectedSettings = field(default_factory=UnprotectedSettings)
    general_text: GeneralTextSettings = field(default_factory=GeneralTextSettings)

    def __post_init__(self) -> None:
        early = list(self.early)
        if len(early) != 2 or not 0 <= early[0] < early[1]:
            raise UsageError(f"probe.early={early}: first and last step, such as [0, 40]")
        object.__setattr__(self, "early", tuple(early))
