"""What is probed, and how much that may cost. Everything is off unless it is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from cl_bench.contracts import UsageError
from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import Count, Index, OnlyWith, Range, Rate, SomeShare
from cl_bench.experiment.steps import steps_of

ENABLED = OnlyWith("enabled", (True,))


@checked("probe.updates.")
@dataclass(frozen=True)
class UpdateSettings:
    """Angles between the weight updates of two phases.

    Attributes:
        enabled: measure them.
        energy: share of an update's squared norm that its principal subspace holds.
        standardise: as the authors' code does; for comparisons with their numbers only.
    """

    enabled: bool = False
    energy: Annotated[SomeShare, ENABLED] = 0.99
    standardise: Annotated[bool, ENABLED] = False


@checked("probe.features.")
@dataclass(frozen=True)
class FeatureSettings:
    """Drift of hidden states on fixed samples of old tasks.

    Attributes:
        enabled: measure it.
        samples: training samples of each old task.
        components: k, principal components that the shift is compared with.
    """

    enabled: bool = False
    samples: Annotated[int, Range(least=2), ENABLED] = 200
    components: Annotated[Count, ENABLED] = 5


@checked("probe.recovery.")
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
    steps: Annotated[Index, ENABLED] = 50
    rate: Annotated[Rate | None, ENABLED] = None
    samples: Annotated[Count | None, ENABLED] = 1000
    at: Annotated[Sequence[Index], ENABLED] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "at", steps_of(self.at))


@checked("probe.landscape.")
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
    samples: Annotated[Count, ENABLED] = 200
    along_early: Annotated[Sequence[float], ENABLED] = (-1.0, 2.5, 15)
    along_late: Annotated[Sequence[float], ENABLED] = (-1.0, 2.0, 13)

    def __post_init__(self) -> None:
        for key in ("along_early", "along_late"):
            places = list(getattr(self, key))
            right = len(places) == 3 and places[0] < places[1] and places[2] >= 2
            if not right or places[2] != int(places[2]):
                raise UsageError(
                    f"probe.landscape.{key}={places}: first place, last place, number of places; "
                    "try [-1, 2, 13]"
                )


@checked("probe.unprotected.")
@dataclass(frozen=True)
class UnprotectedSettings:
    """How much of a task's update lies where keeping large singular directions protects nothing.

    Attributes:
        enabled: measure it.
        preserve_ratio: share of a weight's singular directions that count as preserved.
    """

    enabled: bool = False
    preserve_ratio: Annotated[float, Range(above=0, below=1), ENABLED] = 0.5


@checked("probe.general_text.")
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
    path: Annotated[str | None, ENABLED] = None
    dataset: Annotated[str | None, ENABLED] = None
    subset: Annotated[str | None, ENABLED] = None
    split: Annotated[str, ENABLED] = "test"
    field: Annotated[str, ENABLED] = "text"
    windows: Annotated[Count, ENABLED] = 64
    length: Annotated[int, Range(least=8), ENABLED] = 128
    objective: Annotated[Literal["auto", "continuation", "span_corruption"], ENABLED] = "auto"

    def __post_init__(self) -> None:
        if self.path is not None and self.dataset is not None:
            raise UsageError(
                f"probe.general_text.path={self.path} and probe.general_text.dataset="
                f"{self.dataset}: give one of them"
            )

    @property
    def source(self) -> str:
        """Where the text comes from, for the record."""
        if self.dataset is not None:
            return "/".join(x for x in (self.dataset, self.subset, self.split) if x)
        return self.path or "cl_bench"


@checked("probe.")
@dataclass(frozen=True)
class ProbeSettings:
    """All of them.

    Attributes:
        early: steps of a task between which its early phase lies; what follows is the late one.
        updates, features, recovery, landscape, unprotected, general_text: see there.
    """

    early: Sequence[Index] = (0, 40)
    updates: UpdateSettings = field(default_factory=UpdateSettings)
    features: FeatureSettings = field(default_factory=FeatureSettings)
    recovery: RecoverySettings = field(default_factory=RecoverySettings)
    landscape: LandscapeSettings = field(default_factory=LandscapeSettings)
    unprotected: UnprotectedSettings = field(default_factory=UnprotectedSettings)
    general_text: GeneralTextSettings = field(default_factory=GeneralTextSettings)

    def __post_init__(self) -> None:
        early = list(self.early)
        if len(early) != 2 or early[0] >= early[1]:
            raise UsageError(f"probe.early={early}: first and last step, such as [0, 40]")
        object.__setattr__(self, "early", tuple(early))
