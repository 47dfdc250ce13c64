"""Federated Orthogonal Training (Bakman, Yaldiz, Ezzeldin & Avestimehr, ICLR 2024).

Clients train freely; the server takes what old tasks use out of their mean update (FedProject),

    Delta_l <- Delta_l - Delta_l U_l U_l^T,

where U_l spans the inputs of layer l in old tasks. After each task U_l grows by what the sum of the
clients' statistics says (GPSE): R_k = A_k - U U^T A_k, sketched as Y_k = R_k Omega_k, or R_k R_k^T.
Source: github.com/duygunuryldz/Federated_Orthogonal_Training @ f343e36 (the paper's text was not
at hand).
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from cl_bench.contracts import (
    FederatedStrategy,
    Learner,
    Needs,
    State,
    Statistics,
    Task,
    UsageError,
    batch_sizes,
    generator,
)
from cl_bench.contracts.options import Inherited, OnlyWith, Rate
from cl_bench.strategies.projection.options import (
    Increment,
    PerLayer,
    Protecting,
    per_layer,
    threshold_of,
)
from cl_bench.subspace import (
    LinearMap,
    Projection,
    ResidualSketch,
    SketchKind,
    empty_basis,
    extend,
    leading_inputs,
    rank_to_reach,
)

BATCH = 64
"""Samples whose inputs are in memory at a time; random mixtures are drawn batch by batch."""


class FOT(Protecting, FederatedStrategy):
    """The server's updates are orthogonal to what old tasks use.

    Args:
        eps: share in (0, 1] of the inputs' energy that a basis must hold: one number, one per
            layer in order, or ``{layer pattern: eps}``.
        eps_inc: added to eps per task.
        sketch: ``gaussian`` or ``uniform`` random mixtures of the inputs, or their exact ``gram``.
        width: columns w of a random sketch as a multiple of d; one number or ``{pattern: factor}``.
        residual_ratio: how much of the inputs is new: the share of their ``energy`` (what eps
            means), or the ratio of ``norm`` as published, which keeps more, and at least one
            direction a task.
        extraction: inputs are those in the ``global`` model after the task, or in each client's own
            ``local`` one from the last round, as published.
        dropout: leave dropout on while inputs are collected, as the published permuted MNIST does.
        omega: random mixtures are ``seeded``, or ``secret``: from the system's entropy, so that who
            knows the seed cannot undo them; such a run cannot be repeated.
        shared: as in :class:`Protecting`.

    Raises:
        UsageError: an option out of range.
    """

    needs = Needs(
        engines=frozenset({"federated"}),
        options={"collects_on": "extraction", "capacity_left": "eps"},
    )

    def __init__(
        self,
        eps: PerLayer = 0.8,
        eps_inc: Increment = 0.0,
        sketch: SketchKind = "gram",
        width: Annotated[
            Rate | Mapping[str, Rate], OnlyWith("sketch", ("gaussian", "uniform"))
        ] = 1.0,
        residual_ratio: Literal["energy", "norm"] = "energy",
        extraction: Literal["global", "local"] = "global",
        dropout: bool = False,
        omega: Annotated[
            Literal["seeded", "secret"], OnlyWith("sketch", ("gaussian", "uniform"))
        ] = "seeded",
        **shared: Inherited,
    ) -> None:
        super().__init__(**shared)
        self.eps = eps
        self.eps_inc = eps_inc
        self.sketch: SketchKind = sketch
        self.width = width
        self.residual_ratio = residual_ratio
        self.collects_on: Literal["global", "local"] = extraction
        self.dropout = dropout
        self.omega = omega
        self.basis: dict[str, Tensor] = {}
        self._projections: dict[str, Projection] = {}

    def check(self, learner: Learner) -> None:
        """There must be layers to protect, and lists must have an entry for each."""
        layers = learner.layers(self.protect)
        for i, layer in enumerate(layers):
            per_layer(self.eps, layer.name, i, len(layers), "eps")
            self._width(layer.name)

    def setup(self, learner: Learner, task: Task) -> None:
        """Clients train freely; only biases and normalisation may be held."""
        learner.guard(self.protect, first_task=task.index == 0)

    def server_update(self, learner: Learner, update: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """FedProject: Delta_l <- Delta_l - Delta_l U_l U_l^T."""
        names = {id(p): name for name, p in learner.named_trainable().items()}
        projected = dict(update)
        for layer in learner.layers(self.protect):
            weight, bias = names.get(id(layer.weight)), names.get(id(layer.bias))
            if weight is None or layer.name not in self.basis or weight not in update:
                continue  # frozen, or a head of a task to come
            delta = projected[weight].clone()
            delta_bias = None if bias is None or not layer.augmented else projected[bias].clone()
            matrix = layer.matrix(delta, delta_bias)
            projection = self._projection(layer.name).to(matrix)
            layer.store(projection(matrix), delta, delta_bias)
            projected[weight] = delta
            if bias is not None and delta_bias is not None:
                projected[bias] = delta_bias
        return projected

    def _projection(self, name: str) -> Projection:
        if name not in self._projections:
            self._projections[name] = Projection(self.basis[name])
        return self._projections[name]

    def collect(self, learner: Learner, task: Task) -> Statistics:
        """GPSE on a client: Y_k = R_k Omega_k and how much of A_k is new, for every layer."""
        layers = learner.layers(self.protect)
        sketches = {layer.name: self._sketch(layer, learner.seed, task) for layer in layers}
        sizes = batch_sizes(len(task.train), BATCH, learner.least_batch)
        index = torch.split(torch.arange(len(task.train)), sizes)
        batches = (task.train[i] for i in index)
        taken: Mapping[str, Any] = learner.tap(layers, batches, sketches, self.dropout)
        samples = float(len(task.train))
        found = {"samples": torch.tensor(samples, dtype=torch.float64)}
        for name, s in taken.items():
            found[f"statistic/{name}"] = s.statistic
            if self.residual_ratio == "energy":
                found[f"energy/{name}"] = torch.tensor(s.energy, dtype=torch.float64)
                found[f"residual/{name}"] = torch.tensor(s.residual, dtype=torch.float64)
            else:
                rho = (s.residual / s.energy) ** 0.5 if s.energy else 0.0
                found[f"ratio/{name}"] = torch.tensor(samples * rho, dtype=torch.float64)
        return found

    def _sketch(self, layer: LinearMap, seed: int, task: Task) -> ResidualSketch:
        d, w = layer.in_features, 0
        rng = None
        if self.sketch != "gram":
            w = max(1, round(d * self._width(layer.name)))
            if self.omega == "seeded":
                rng = generator(seed, "omega", task.index, layer.name)
            else:
                rng = torch.Generator()
                rng.seed()
        return ResidualSketch(d, self.basis.get(layer.name), self.sketch, w, rng)

    def _width(self, name: str) -> float:
        if not isinstance(self.width, Mapping):
            return self.width
        matching = [f for pattern, f in self.width.items() if fnmatchcase(name, pattern)]
        if not matching:
            raise UsageError(f"strategy.width={dict(self.width)}: no pattern matches {name!r}")
        return matching[0]

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """GPSE on the server, from sums alone: grow U until it holds a share eps of the inputs."""
        layers = learner.layers(self.protect)
        for i, layer in enumerate(layers):
            eps = threshold_of(
                self.eps, layer.name, i, len(layers), self.eps_inc * task.index, key="eps"
            )
            self.basis[layer.name] = self._grown(layer, eps, stats)
        self._projections.clear()

    def _grown(self, layer: LinearMap, eps: float, sums: Statistics) -> Tensor:
        name, official = layer.name, self.residual_ratio == "norm"
        U = self.basis.get(name, empty_basis(layer.in_features))
        if official:
            rho = float(sums[f"ratio/{name}"]) / float(sums["samples"])  # type: ignore[arg-type]
        else:
            energy = float(sums[f"energy/{name}"])  # type: ignore[arg-type]
            rho = float(sums[f"residual/{name}"]) / max(energy, 1e-300)  # type: ignore[arg-type]
        if rho <= 0.0:
            return U
        inner = (rho - (1 - eps)) / rho  # share of the new part that is still wanted
        S2, directions = leading_inputs(sums[f"statistic/{name}"], layer.in_features, self.sketch)  # type: ignore[arg-type]
        k = rank_to_reach(S2, float(S2.sum()), inner)
        return extend(U.to(directions), directions[:, : max(k, int(official))])

    def share(self, purpose: Literal["fit", "collect"]) -> State:
        """Clients meet U only where they take it out of their inputs."""
        return {} if purpose == "fit" else self.state_dict()

    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """Rank of each basis, and the share of input dimensions that is left to learn in."""
        return {
            name: {"rank": U.shape[1], "capacity_left": 1 - U.shape[1] / U.shape[0]}
            for name, U in self.basis.items()
        }

    def state_dict(self) -> State:
        """Bases."""
        return {"basis": dict(self.basis)}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`; what was not shared is empty."""
        self.basis = dict(state.get("basis", {}))
        self._projections.clear()
