"""Doing something to a learner that leaves no trace, and scoring it on any data."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from cl_bench.contracts import Data, Task
from cl_bench.experiment.loader import EvalLoader
from cl_bench.experiment.snapshot import random_states, set_random_states
from cl_bench.learners import BaseLearner
from cl_bench.learners.observed import judge


@contextmanager
def same_randomness() -> Iterator[None]:
    """Random generators are afterwards where they were."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)


@contextmanager
def untouched(learner: BaseLearner) -> Iterator[None]:
    """Weights, buffers, gradients, modes and what is frozen are afterwards what they were."""
    kept = weights_of(learner)
    parameters = dict(learner.named_parameters())
    gradients = {name: p.grad for name, p in parameters.items()}
    trained = {name: p.requires_grad for name, p in parameters.items()}
    modes = [(module, module.training) for module in learner.modules()]
    held = set(learner.held_norms)
    for parameter in parameters.values():
        parameter.grad = None  # the run's own must not be written into
    try:
        yield
    finally:
        learner.load_state_dict(kept)
        for name, parameter in parameters.items():
            parameter.requires_grad_(trained[name])
            parameter.grad = gradients[name]
        learner.held_norms.clear()
        learner.held_norms.update(held)
        for module, training in modes:
            module.training = training


def weights_of(learner: BaseLearner) -> dict[str, Tensor]:
    """A copy of weights and buffers."""
    return {name: value.detach().clone() for name, value in learner.state_dict().items()}


def measure(
    learner: BaseLearner, task: Task, data: Data, batch_size: int, max_samples: int | None
) -> tuple[float, dict[str, float]]:
    """Mean score and mean details over data of a task, as the accuracy matrix takes them.

    Args:
        learner: at the weights in question.
        task: whose data it is.
        data: its test data or a probe.
        batch_size: samples of a batch.
        max_samples: a fixed random subset of this size; None means all.
    """
    scores: list[Tensor] = []
    found: dict[str, list[Tensor]] = {}
    for batch in EvalLoader(data, batch_size, max_samples, mixed=learner.mixed(task)):
        score, details = judge(learner, batch, task)
        scores.append(score.double())
        for name, values in details.items():
            found.setdefault(name, []).append(values.double())
    return float(torch.cat(scores).mean()), {
        name: float(torch.cat(values).nanmean()) for name, values in found.items()
    }
