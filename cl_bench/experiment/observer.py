"""Watches what updates do to the subspaces of old inputs, for any strategy, changing nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from cl_bench.contracts import Protect, State, Task, split_batch
from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import Count, OnlyWith, SomeShare
from cl_bench.learners import BaseLearner
from cl_bench.metrics.alignment import relative_change, share_inside
from cl_bench.subspace import LinearMap, grow


@checked("alignment.")
@dataclass(frozen=True)
class AlignmentSettings:
    """How alignment is watched.

    Attributes:
        enabled: watch at all.
        threshold: share of each old task's input energy that the old subspace M holds.
        samples: training samples per task that M is found from.
        batches: batches whose raw gradient is measured at the start of a task.
    """

    enabled: bool = True
    threshold: Annotated[SomeShare, OnlyWith("enabled", (True,))] = 0.95
    samples: Annotated[Count, OnlyWith("enabled", (True,))] = 300
    batches: Annotated[Count, OnlyWith("enabled", (True,))] = 8


class Observer:
    """Watches a run from the side. Whatever it measures, it changes no bit of the run.

    Attributes:
        steps: optimizer steps of a task after which :meth:`after_step` is called.
    """

    steps: frozenset[int] = frozenset()

    @property
    def watches_steps(self) -> bool:
        """Whether it looks between optimizer steps at all."""
        return bool(self.steps)

    def before_pretraining(self, learner: BaseLearner) -> None:
        """Weights are as constructed. Called when a run is resumed, too."""

    def after_pretraining(self, learner: BaseLearner) -> None:
        """Weights are those that the first task starts from. Called when a run is resumed, too."""

    def before_task(self, learner: BaseLearner, task: Task) -> None:
        """After ``setup`` and before the first step. Not called when a task is resumed."""

    def after_step(self, learner: BaseLearner, task: Task, step: int, rate: float) -> None:
        """Step number ``step`` (from 1) of the task was taken, at this learning rate."""

    def after_task(self, learner: BaseLearner, task: Task) -> Mapping[str, Mapping[str, float]]:
        """After ``release``, weights still on their device: numbers per layer."""
        return {}

    def state_dict(self) -> State:
        """What it must remember, as tensors and plain values."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""


class AlignmentObserver(Observer):
    """One old-input subspace M per layer, grown task by task with the same rule for everybody.

    Quantities per layer and task:

    * ``input_rank``: columns of M after the task; ``input_capacity_left``: 1 - rank / d.
    * ``raw_share``: share of the loss gradient inside M, before the task's first step.
    * ``applied_share``: share of the weight change over the whole task inside M.
    * ``relative_update``: ||W' - W|| / ||W|| over the task.
    """

    def __init__(self, settings: AlignmentSettings, batch_size: int, seed: int) -> None:
        self.settings = settings
        self.batch_size = batch_size
        self.seed = seed
        self.memory: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}
        self._raw: dict[str, float] = {}

    def before_task(self, learner: BaseLearner, task: Task) -> None:
        """Remember the weights; measure raw gradients against M."""
        layers = _layers(learner)
        self._before = {layer.name: _weights(layer).clone() for layer in layers}
        self._raw = {}
        if not self.memory:
            return
        drawn = task.sample(self.settings.batches * self.batch_size, self.seed)
        inside: dict[str, list[float]] = {}
        names = {id(p): name for name, p in learner.named_parameters()}
        for batch in split_batch(drawn, self.batch_size, learner.least_batch):
            gradients = learner.gradients(batch)
            for layer in layers:
                gradient = gradients.get(names[id(layer.weight)])
                if gradient is not None and layer.name in self.memory:
                    matrix = layer.matrix(gradient, None)
                    share = share_inside(matrix, self.memory[layer.name].to(matrix.device))
                    inside.setdefault(layer.name, []).append(share)
        self._raw = {n: float(torch.tensor(v).nanmean()) for n, v in inside.items()}

    def after_task(self, learner: BaseLearner, task: Task) -> Mapping[str, Mapping[str, float]]:
        """Measure the task's weight change against M, then grow M by the task's inputs."""
        layers = _layers(learner)
        found: dict[str, dict[str, float]] = {}
        for layer in layers:
            before, after = self._before[layer.name], _weights(layer)
            before = before.to(after.device)
            row = found[layer.name] = {"relative_update": relative_change(before, after)}
            if layer.name in self.memory:
                basis = self.memory[layer.name].to(after.device)
                row["applied_share"] = share_inside(after - before, basis)
                if layer.name in self._raw:
                    row["raw_share"] = self._raw[layer.name]
        moments = learner.tap(layers, [task.sample(self.settings.samples, self.seed)])
        for name, inputs in moments.items():
            self.memory[name], _ = grow(self.memory.get(name), inputs, self.settings.threshold)
            d, rank = self.memory[name].shape
            found[name]["input_rank"] = rank
            found[name]["input_capacity_left"] = 1 - rank / d
        self._before, self._raw = {}, {}
        return found

    def state_dict(self) -> State:
        """M, and inside a task the weights and raw shares from its start."""
        return {"memory": dict(self.memory), "before": dict(self._before), "raw": dict(self._raw)}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.memory = dict(state["memory"])
        self._before, self._raw = dict(state["before"]), dict(state["raw"])


def _layers(learner: BaseLearner) -> list[LinearMap]:
    """Every linear map but per-task heads."""
    return learner.layers(Protect(bias="free"))


def _weights(layer: LinearMap) -> Tensor:
    return layer.merged()
