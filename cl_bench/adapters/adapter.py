"""``adapter=<name>``: a strategy trains an adapter in place of the weights."""

import math
import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Annotated, Any

import torch
from torch import Tensor

from cl_bench.adapters.adapted import Adapted, End, Lifetime
from cl_bench.adapters.attached import LOOKING, REWRITING, Attached, start_of
from cl_bench.adapters.looking import pieces
from cl_bench.adapters.reparametrised import Reparametrisation
from cl_bench.adapters.targets import chosen
from cl_bench.adapters.trial import START, fitted, tried
from cl_bench.contracts import Learner, Needs, Task, UsageError, derive_seed
from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import Count, Length, shown
from cl_bench.subspace import LinearMap


@checked("adapter.")
class Adapter(Adapted):
    """Adapters of one kind on layers of some kinds; a strategy trains them as it trains weights.

    Heads that a classifier brings train beside them; everything else is frozen.

    Args:
        config: of PEFT, or of ours.
        targets: kinds of layers (``linear``, ``attention``, ``mlp``, ``conv``; what they are is
            seen in a forward pass) and shell patterns of whole names.
        lifetime: as in :class:`Adapted`.
        end: as in :class:`Adapted`. With ``keep`` and an adapter a task, each task is tested with
            its own, and tasks not yet learned with the latest.
        size: which option of ``config`` says how large it is; null: it has one size.
        budget: how many numbers the adapter trains, or what share of the network's without heads
            (``0.5%``); the ``size`` that comes nearest is taken in place of the one in ``config``.
        samples: of a task's training data, which starts from data look at.

    Raises:
        UsageError: an option is out of range, or has no effect.

    Attributes:
        count: how many numbers the adapter trains.
    """

    def __init__(
        self,
        config: Any,
        targets: Annotated[Sequence[str], Length(1)] = ("linear",),
        lifetime: Lifetime = "per_task",
        end: End = "merge",
        size: str | None = None,
        budget: Count | str | None = None,
        samples: Count | None = None,
    ) -> None:
        super().__init__(lifetime, end)
        name = type(config).__name__
        start = start_of(config)
        own = lifetime == "per_task" and end == "keep"
        if own and start is not None and REWRITING[start]:
            raise UsageError(
                f"adapter.config.init_lora_weights={config.init_lora_weights}: it begins by "
                "changing the weights under it, on which the next task's adapter could not stand; "
                "use adapter.end=merge, or adapter.lifetime=shared"
            )
        looks = start in LOOKING or getattr(config, "sampled", False)
        if looks and samples is None:
            raise UsageError(f"adapter.samples=null: {name} starts from data; say how many samples")
        if samples is not None and not looks:
            raise UsageError(f"adapter.samples={samples}: {name} does not start from data")
        if size is not None and not hasattr(config, size):
            raise UsageError(f"adapter.size={size}: {name} has no such option")
        if budget is not None and size is None:
            raise UsageError(f"adapter.budget={shown(budget)}: {name} has one size; leave it out")
        self.needs = Needs(
            shardable=False,
            task_id_at_test=own,
            freezes_weights=lifetime != "shared",
            adapts=True,
        )
        self.idle = frozenset() if own else frozenset({"inference"})
        self.config, self.targets, self.size = config, tuple(targets), size
        self.budget = None if budget is None else _budget(budget)
        self.samples = samples
        self.count = 0
        self._maps: list[LinearMap] = []
        self._of: weakref.ref[Learner] | None = None
        self._made: Any = config

    def check(self, learner: Learner) -> None:
        """The targets are there, the adapter fits them and starts where the network is."""
        self._maps = chosen(learner, self.targets)
        self._of = weakref.ref(learner)
        self._made = self.config
        if self.budget is not None and self.size is not None:
            found = fitted(self._maps, self.config, self.size, self._wanted(learner))
            self._made = found.config
        self.count, change = tried(self._maps, self._made)
        if not change <= START:
            name = type(self.config).__name__
            raise UsageError(
                f"adapter.config: {name}, as it is configured, changes outputs by "
                f"{change:.2g} of their size before anything was learned; choose a start at zero, "
                "or other targets"
            )

    def check_elsewhere(self, promised: bool = False) -> None:
        """Somebody else's loop attaches what it likes itself."""
        raise UsageError(
            "adapters are attached in cl_bench's own loop: python -m cl_bench adapter=..."
        )

    def _wanted(self, learner: Learner) -> int:
        assert self.budget is not None
        number, share = self.budget
        if not share:
            return int(number)
        roles = learner.roles()
        named = learner.network.named_parameters()
        body = sum(p.numel() for name, p in named if roles[name] != "head")
        return max(1, round(number * body))

    def maps(self, learner: Learner) -> Sequence[LinearMap]:
        """The layers that get adapters."""
        if self._of is None or self._of() is not learner:
            self.check(learner)
        return self._maps

    def make(self, learner: Learner) -> Any:
        """The configuration, of the size that the budget asks for."""
        self.maps(learner)
        return self._made

    def looked(self, learner: Learner, task: Task) -> Mapping[str, Tensor]:
        """Gradients or the like, for what starts from them."""
        if isinstance(self.config, Reparametrisation) and self.samples is not None:
            maps = self.maps(learner)
            return self._made.look(learner, task, maps, self.samples)  # type: ignore[no-any-return]
        return {}

    @contextmanager
    def drawing(self, learner: Learner, task: Task) -> Iterator[None]:
        """From numbers of its own; what is kept is drawn again alike."""
        index = 0 if self.end == "keep" else task.index
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(learner.seed, "adapter", index))
            yield

    def attach(
        self, learner: Learner, task: Task, config: Any, seen: Mapping[str, Tensor]
    ) -> Attached:
        """With the starts that PEFT makes from data."""
        start = start_of(config)
        if start not in LOOKING or self.samples is None:
            return super().attach(learner, task, config, seen)
        from cl_bench.adapters.starts import from_data

        batches = list(pieces(learner, task, self.samples))
        return from_data(learner, batches, config, self.maps(learner), self.called(task))

    def inference(self, learner: Learner, task: Task | None) -> AbstractContextManager[None]:
        """The task's own adapter, where it has one that is not in the network now."""
        own = task is not None and "inference" not in self.idle
        if own and task is not None and self.key(task) in self.kept:
            return self.as_after(learner, task)
        return super().inference(learner, task)

    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """How many numbers trained, in all and around each layer."""
        return {"adapter": {"parameters": float(self.count), "layers": float(len(self._maps))}}


def _budget(given: int | str) -> tuple[float, bool]:
    """A number, and whether it is a share of the network's."""
    if isinstance(given, int):
        return float(given), False
    found = re.fullmatch(r"\s*([0-9.]+(?:e-?[0-9]+)?)\s*%\s*", given)
    try:
        share = float(found[1]) / 100 if found else math.nan
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise UsageError(
            f"adapter.budget={given}: a whole number of parameters, or a share like 0.5%"
        )
    return share, True
