"""Restricted Orthogonal Gradient Projection (Yang, Yang, Liu, Li & Liu, AI Open 4, 2023, "ROGO").

GPM without giving up old weights for good. While a task is learned, directions B of the frozen
space span(M) that its gradient points along are relaxed: W_eff = W + W B (S - I) B^T with a trained
S that a penalty beta ||S - I||_F^2 keeps near I. W itself is projected by the whole of M. The
layer holds W_eff, so at the end of the task there is nothing to merge, and nothing grows with the
number of tasks.

The steps follow the authors' code (github.com/THUNLP-MT/ROGO @ 87ec345); we have not checked the
paper's equation numbers.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from torch import Tensor

from cl_bench.contracts import (
    Batch,
    EpochDecision,
    Learner,
    Progress,
    State,
    Statistics,
    Task,
    UsageError,
    derive_seed,
)
from cl_bench.contracts.options import Count, Inherited, OnlyWith, Rate, SomeShare, Strength
from cl_bench.strategies.projection.gpm import GPM, layer_gradients
from cl_bench.strategies.projection.options import PerLayer, per_layer, threshold_of
from cl_bench.subspace import (
    Moments,
    Projection,
    RelaxedSpaces,
    complement_within,
    first_uses,
    leading_directions,
    split_as_published,
    split_by_angle,
)


class ROGO(GPM):
    """Relaxes the part of the frozen space that the new task's gradient asks for.

    Args:
        gradient_threshold: eps_g, share of the gradient's energy that its leading directions U
            hold; a number, one per layer, or ``{layer pattern: share}``.
        cosine: eps_s, least ||U^T u|| of a unit vector u that is relaxed; likewise.
        strength: beta.
        relax_samples: training samples that the gradient is taken on.
        schedule: ``epoch`` relaxes after every epoch as long as the last time found something, and
            scales the rate by ``rate_factor`` when it does (the authors' PMNIST); ``plateau`` does
            when a decay on plateau has run out of patience and the rate is at most ``relax_below``,
            and sets the rate back (their CIFAR-100).
        rounds: most relaxations of a task; None sets no limit.
        rate_factor: see ``schedule``.
        relax_below: see ``schedule``.
        representation: M is found from layer inputs (``activations``, as in the paper) or from the
            rows of the loss gradient (``gradients``). The authors' CIFAR-100 code takes gradients
            too, but without clearing those of the last training step, which its sum then holds;
            here it is the samples' gradient alone.
        official_quirks: search in a basis that is no longer orthonormal from a task's second
            relaxation on, as the authors' code does.
        shared: as in :class:`GPM`.

    Raises:
        UsageError: an option is out of range.
    """

    def __init__(
        self,
        *,
        gradient_threshold: PerLayer = 0.97,
        cosine: PerLayer = 0.9,
        strength: Strength = 1.0,
        relax_samples: Count = 125,
        schedule: Literal["epoch", "plateau"] = "epoch",
        rounds: Count | None = None,
        rate_factor: Annotated[SomeShare, OnlyWith("schedule", ("epoch",))] = 0.5,
        relax_below: Annotated[Rate, OnlyWith("schedule", ("plateau",))] = 5e-4,
        representation: Literal["activations", "gradients"] = "activations",
        official_quirks: bool = False,
        **shared: Inherited,
    ) -> None:
        super().__init__(**shared)
        if representation == "gradients" and not isinstance(self.samples, int):
            raise UsageError(
                f"strategy.samples={self.samples}: strategy.representation=gradients takes one "
                "gradient for all layers, so one number, e.g. strategy.samples=125"
            )
        self.gradient_threshold = gradient_threshold
        self.cosine = cosine
        self.strength = strength
        self.relax_samples = relax_samples
        self.schedule = schedule
        self.needs = replace(
            self.needs,
            plateau=schedule == "plateau",
            options={"plateau": "schedule"},
            gathers=True,  # gradients of its own
        )
        self.rounds = rounds
        self.rate_factor = rate_factor
        self.relax_below = relax_below
        self.representation = representation
        self.official_quirks = official_quirks
        self.rest: dict[str, Tensor] = {}  # the part of span(M) that is not relaxed
        self.done = 0  # successful relaxations of this task
        self.searching = False
        self.turned: dict[str, tuple[int, float]] = {}  # q and ||S - I||_F at the task's end
        self.relaxed: RelaxedSpaces | None = None

    def footprint(self, learner: Learner, tasks: int, processes: int) -> None:
        """It has more than :class:`GPM`, and does not say how much."""
        return

    def check(self, learner: Learner) -> None:
        """As :class:`GPM`, for its own lists too."""
        super().check(learner)
        layers = learner.layers(self.protect)
        for i, layer in enumerate(layers):
            per_layer(self.cosine, layer.name, i, len(layers), "cosine")
            key = "gradient_threshold"
            per_layer(self.gradient_threshold, layer.name, i, len(layers), key)

    def setup(self, learner: Learner, task: Task) -> None:
        """As GPM; nothing is relaxed yet."""
        self.rest = dict(self.memory)
        super().setup(learner, task)
        self.relaxed = self._nothing_relaxed(learner)
        self.done, self.searching = 0, bool(self.memory)
        self.turned = {}

    def _nothing_relaxed(self, learner: Learner) -> RelaxedSpaces:
        if self.projected_at == "step":
            return RelaxedSpaces(self.layers)
        born = self.confinement.at_inputs if self.confinement else ()
        frozen = {name: M for name, M in self.memory.items() if name not in born}
        return RelaxedSpaces(self.layers, frozen, carried=learner.projectable != "step")

    def projection(self, name: str) -> Projection:
        """W's changes go through I - M M^T, unless the relaxed space sees to that."""
        M = self.memory[name]
        if self.projected_at == "step" or self.relaxed is None or name not in self.relaxed.spaces:
            return super().projection(name)
        if name in self.relaxed.frozen:
            return Projection(M[:, :0])
        # A gradient that is born projected keeps G B for S.
        return Projection(complement_within(M, self.relaxed.spaces[name].basis))

    def param_groups(self, learner: Learner) -> Iterable[dict[str, Any]]:
        """The weights, and S without weight decay."""
        scales = self.relaxed.parameters() if self.relaxed else []
        return [*super().param_groups(learner), {"params": scales, "weight_decay": 0.0}]

    def constrain(self, learner: Learner) -> None:
        """dL/dS = (W B)^T G B + 2 beta (S - I), and G <- G - (G M) M^T."""
        if self.relaxed:
            self.relaxed.take(self.strength)
        super().constrain(learner)

    def after_step(self, learner: Learner, batch: Batch, out: Tensor) -> None:
        """W_eff <- W_eff + W B (S_new - S_old) B^T, unless the gradient has carried that."""
        super().after_step(learner, batch, out)
        if self.relaxed:
            self.relaxed.follow()

    def after_epoch(self, learner: Learner, task: Task, progress: Progress) -> EpochDecision | None:
        """Relax where the schedule says so; what was found changes the rate."""
        if not self.searching or not self._due(progress):
            return None
        self.searching = self.relax(learner, task, progress.epoch) > 0
        if not self.searching:
            return None
        self.done += 1
        self.searching = self.rounds is None or self.done < self.rounds
        if self.schedule == "plateau":
            return EpochDecision(reset_rate=True, rebuild_optimizer=True)
        return EpochDecision(scale_rate=self.rate_factor, rebuild_optimizer=True)

    def _due(self, progress: Progress) -> bool:
        if progress.epoch == progress.max_epochs:
            return False  # nothing would train S
        if self.schedule == "epoch":
            return True
        if progress.plateau is None:  # a loop of somebody else's
            raise UsageError(
                "strategy.schedule='plateau': this run does not lower its rate on a plateau; add "
                "schedule=plateau, or use strategy.schedule=epoch"
            )
        return progress.plateau and progress.learning_rate <= self.relax_below

    def relax(self, learner: Learner, task: Task, epoch: int) -> int:
        """Move directions from ``rest`` to B (``update_space``); returns how many."""
        assert self.relaxed is not None
        batch = task.sample(self.relax_samples, derive_seed(learner.seed, "relax", epoch))
        gradients = layer_gradients(learner, self.layers, batch)
        split = split_as_published if self.official_quirks else split_by_angle
        found: dict[str, int] = {}
        for i, (layer, first) in enumerate(zip(self.layers, first_uses(self.layers), strict=True)):
            name, count = layer.name, len(self.layers)
            if name not in gradients or name not in self.rest or layer is not first:
                continue
            eps_g = threshold_of(self.gradient_threshold, name, i, count, key="gradient_threshold")
            eps_s = threshold_of(self.cosine, name, i, count, key="cosine")
            U = leading_directions(gradients[name], eps_g)
            B, self.rest[name] = split(self.rest[name].to(U), U, eps_s)
            if B.shape[1]:
                self.relaxed.grow(name, B)
                found[name] = B.shape[1]
        if self.confinement:
            self.confinement.replace({name: self.projection(name) for name in found})
        return sum(found.values())

    def collect(self, learner: Learner, task: Task) -> Statistics:
        """As GPM, from W_eff."""
        if self.relaxed:
            self.turned = {
                name: (len(space.change), float(space.change.detach().norm()))
                for name, space in self.relaxed.spaces.items()
            }
        if self.representation == "activations":
            return super().collect(learner, task)
        assert isinstance(self.samples, int)
        batch = task.sample(self.samples, learner.seed)
        found = {}
        for name, G in layer_gradients(learner, learner.layers(self.protect), batch).items():
            found[name] = Moments(G.shape[1])
            # One row a sample is what a linear layer sees; only the place to project hangs on it.
            found[name].add(G, samples=len(G))
        return found

    def release(self, learner: Learner) -> None:
        """S has done its work."""
        self.relaxed, self.rest = None, {}
        super().release(learner)

    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """GPM's, the directions that the task relaxed, and ||S - I||_F at its end."""
        return {
            name: {
                **values,
                "relaxed": self.turned.get(name, (0, 0.0))[0],
                "turned": self.turned.get(name, (0, 0.0))[1],
            }
            for name, values in super().metrics().items()
        }

    def state_dict(self) -> State:
        """GPM's, and where the current task's relaxation stands."""
        return {
            **super().state_dict(),
            "rest": dict(self.rest),
            "done": self.done,
            "searching": self.searching,
            "turned": {name: list(values) for name, values in self.turned.items()},
            "relaxed": self.relaxed.state_dict() if self.relaxed else {},
        }

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.rest = dict(state["rest"])
        self.done, self.searching = state["done"], state["searching"]
        self.turned = {name: (int(q), float(s)) for name, (q, s) in state["turned"].items()}
        if self.relaxed:
            self.memory = dict(state["memory"])
            self.relaxed.load_state_dict(state["relaxed"])
            self.confine()
        super().load_state_dict(state)
