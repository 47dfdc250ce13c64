"""Gradient Projection Memory (Saha, Garg & Roy, ICLR 2021).

After each task a layer remembers an orthonormal basis M of the inputs that carry a share eps of
their energy. Later gradients lose their part inside it, G <- G - (G M) M^T, so that what the layer
does to remembered inputs stays as it is.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from cl_bench.contracts import (
    Batch,
    Learner,
    Memory,
    Needs,
    State,
    Statistics,
    Task,
    UsageError,
)
from cl_bench.contracts.options import Inherited
from cl_bench.strategies.projection.options import (
    Increment,
    PerLayer,
    Protecting,
    Samples,
    per_layer,
    threshold_of,
)
from cl_bench.subspace import Confinement, LinearMap, Moments, Projection, Where, grow


class GPM(Protecting):
    """Projects updates out of the span of old inputs.

    Args:
        threshold: eps in (0, 1]: one number, one per protected layer in order, or
            ``{layer pattern: eps}``.
        increment: added to every threshold per task (the papers' schedules), capped at 1.
        samples: training samples whose layer inputs are decomposed after a task: one number, one
            per protected layer in order, or ``{layer pattern: number}``; of one draw, the first.
        rank_rule: ``official`` as the authors' code has it: on the first task the direction that
            crosses eps is left out, later it is taken in. ``energy``: always taken in. An eps of 1
            takes every direction in, by either rule.
        project: ``auto`` projects at the cheapest place that keeps the *weight change* in the
            subspace for the optimizer at hand; ``input``, ``gradient`` or ``step`` insists.
            ``both`` projects gradients and then the step: of a rule that is steepest descent in a
            norm, the best direction in the subspace instead of the best one's part in it.
        shared: as in :class:`Protecting`.

    Raises:
        UsageError: a threshold outside (0, 1], or another option out of range.
    """

    needs = Needs(rewrites_gradients=True)

    def __init__(
        self,
        threshold: PerLayer = 0.95,
        increment: Increment = 0.0,
        samples: Samples = 300,
        rank_rule: Literal["official", "energy"] = "official",
        project: Literal["auto", "input", "gradient", "step", "both"] = "auto",
        **shared: Inherited,
    ) -> None:
        super().__init__(**shared)
        self.threshold = threshold
        self.increment = increment
        self.samples = samples
        self.rank_rule = rank_rule
        self.project = project
        self.memory: dict[str, Tensor] = {}
        self.rows_per_sample: dict[str, float] = {}
        self.layers: list[LinearMap] = []
        self.projected_at: Where = "gradient"
        self.rows_per_step: dict[str, float] = {}
        self.confinement: Confinement | None = None

    def check(self, learner: Learner) -> None:
        """There must be layers to protect, and lists must have an entry for each."""
        layers = learner.layers(self.protect)
        for i, layer in enumerate(layers):
            threshold_of(self.threshold, layer.name, i, len(layers))
            per_layer(self.samples, layer.name, i, len(layers), "samples")

    def check_elsewhere(self, promised: bool = False) -> None:
        """Inputs can be projected where the loss is known to come through the forward pass alone.

        Raises:
            UsageError: ``project="input"``, and nothing is ``promised``.
        """
        if self.project == "input" and not promised:
            raise UsageError(
                f"{type(self).__name__}(project='input') is right only where the loss reaches the "
                "weights through the forward pass alone, which cannot be known of somebody else's "
                "loop: use project='auto', or promise it with Guarded(..., inputs=<batch size>)"
            )

    def footprint(self, learner: Learner, tasks: int, processes: int) -> Memory | None:
        """Bases of half of all directions or more, of which no number takes more than another.

        A basis M (d, k) is there in float64, and twice in the weights' own numbers in a projection,
        by the shorter of M and its complement; every process holds all of them. Beside them stand
        weights from before the step, where that is what is projected, and at a task's end second
        moments.
        """
        layers = learner.layers(self.protect)
        bases = sum(m.in_features**2 * max(8, 4 + m.weight.element_size()) for m in layers)
        after = self.project in ("step", "both") or (
            self.project == "auto" and learner.projectable == "step"
        )
        rows = [-(-m.out_features // processes) * m.in_features for m in layers]
        before = sum(n * m.weight.element_size() for n, m in zip(rows, layers, strict=True))
        change = max((3 * n * m.weight.element_size() for n, m in zip(rows, layers, strict=True)))
        largest = max(m.in_features for m in layers)
        moments = sum(8 * m.in_features**2 for m in layers)
        return Memory(
            kept=bases if tasks > 1 else bases // 2,
            stepping=(before + change if after else change) if tasks > 1 else 0,
            boundary=moments + 4 * 8 * largest**2,
        )

    def setup(self, learner: Learner, task: Task) -> None:
        """Confine every remembered layer to the complement of its memory."""
        learner.guard(self.protect, first_task=not self.memory)
        self.layers = learner.layers(self.protect)
        self.check(learner)  # a wrong list should not wait for the task's end
        self.projected_at = self.place(learner)
        self.rows_per_step = {
            name: learner.batch_size * n for name, n in self.rows_per_sample.items()
        }
        self.confine()

    def confine(self) -> None:
        """Give every remembered layer its projection."""
        if self.confinement:
            self.confinement.release()
        projections = {name: self.projection(name) for name in self.memory}
        self.confinement = Confinement(
            self.layers,
            projections,
            self.projected_at,
            self.rows_per_step,
            gradients_too=self.project == "both",
        )

    def projection(self, name: str) -> Projection:
        """What the weight changes of a layer go through: I - M M^T."""
        return Projection(self.memory[name])

    def place(self, learner: Learner) -> Where:
        """Where changes are projected.

        Raises:
            UsageError: at inputs or gradients, where the weights would not stay in the subspace.
        """
        if self.project == "input" and learner.projectable != "input":
            raise UsageError(
                "strategy.project=input keeps weight changes in the subspace for plain SGD in full "
                "precision alone, without weight decay, penalties on the weights or shared "
                f"weights: use strategy.project={learner.projectable} or auto"
            )
        if self.project == "gradient" and learner.projectable == "step":
            raise UsageError(
                "strategy.project=gradient: this optimizer leads projected gradients out of their "
                "subspace again (weight decay, momentum of before, or a rule of its own): use "
                "strategy.project=step or auto"
            )
        if self.project == "both":
            return "step"
        return learner.projectable if self.project == "auto" else self.project

    def constrain(self, learner: Learner) -> None:
        """G <- G - (G M) M^T, unless the gradient was born projected."""
        if self.confinement:
            self.confinement.constrain()

    def after_step(self, learner: Learner, batch: Batch, out: Tensor) -> None:
        """Momentum, Adam and weight decay: project the step itself."""
        if self.confinement:
            self.confinement.after_step()

    def collect(self, learner: Learner, task: Task) -> Statistics:
        """Second moments R R^T of every layer's inputs R (d x n)."""
        layers = learner.layers(self.protect)
        counts = [
            per_layer(self.samples, layer.name, i, len(layers), "samples")
            for i, layer in enumerate(layers)
        ]
        batch = task.sample(max(counts), learner.seed)
        if len(set(counts)) == 1:
            return learner.tap(layers, [batch])
        into = {
            layer.name: Moments(layer.in_features, limit=n)
            for layer, n in zip(layers, counts, strict=True)
        }
        return learner.tap(layers, [batch], into)

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """Remember every layer's inputs R."""
        for i, (name, R) in enumerate(stats.items()):
            assert isinstance(R, Moments)
            eps = threshold_of(self.threshold, name, i, len(stats), self.increment * task.index)
            self.remember(name, R, eps)
            self.rows_per_sample[name] = R.rows / max(R.samples, 1)

    def remember(self, name: str, R: Moments, eps: float) -> None:
        """Grow a layer's basis until it explains a share eps of R (Eq. 5, 8 and 9)."""
        self.memory[name], _ = grow(self.memory.get(name), R, eps, self.below(name))

    def below(self, name: str) -> bool:
        """Whether the direction that crosses the threshold is left out."""
        return self.rank_rule == "official" and name not in self.memory

    def release(self, learner: Learner) -> None:
        """Give the layers their own gradients back."""
        if self.confinement:
            self.confinement.release()
        self.confinement, self.layers = None, []

    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """Rank of each basis, and the share of input dimensions that is left to learn in."""
        return {
            name: {"rank": M.shape[1], "capacity_left": 1 - M.shape[1] / M.shape[0]}
            for name, M in self.memory.items()
        }

    def state_dict(self) -> State:
        """Bases, the inputs per sample, and where the current task stands."""
        return {
            "memory": dict(self.memory),
            "rows_per_sample": dict(self.rows_per_sample),
            "confinement": self.confinement.state_dict() if self.confinement else {},
        }

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.memory = dict(state["memory"])
        self.rows_per_sample = dict(state["rows_per_sample"])
        if self.confinement:
            self.confinement.load_state_dict(state["confinement"])


def layer_gradients(
    learner: Learner, layers: Sequence[LinearMap], batch: Batch
) -> dict[str, Tensor]:
    """Gradient G (o, d) of the mean loss over ``batch``, by layer; frozen layers are absent."""
    gradients = learner.gradients(batch)
    by_parameter = {id(p): gradients[name] for name, p in learner.named_trainable().items()}
    found = {}
    for layer in layers:
        weight = by_parameter.get(id(layer.weight))
        if weight is not None:
            bias = None if layer.bias is None else by_parameter.get(id(layer.bias))
            if bias is None and layer.bias is not None:
                bias = layer.bias.new_zeros(layer.bias.shape)
            found[layer.name] = layer.matrix(weight, bias)
    return found
