"""FW-Merging: a merge that follows the gradient of old and new tasks towards one model at a time.

Chen et al., "FW-Merging: Scaling Model Merging with Frank-Wolfe Optimization", arXiv:2503.12649,
the hard form. All models take part in every merge, so all are kept; the gradient is taken of a
memory, for a stream has no old data at hand.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from cl_bench.contracts import (
    Batch,
    Learner,
    Needs,
    Plan,
    State,
    Statistics,
    Strategy,
    Stream,
    Task,
)
from cl_bench.contracts.options import Count, SomeShare
from cl_bench.merging import FrankWolfe
from cl_bench.strategies.merging.weights import own_heads, running_names


class FWMerging(Strategy):
    """Trains every task from theta_0, and merges all models by Frank-Wolfe steps.

    Heads that belong to one task each stay as that task left them; running statistics are averaged.

    Args:
        memory: samples kept of every task, for the gradient of their mean loss.
        iterations: Frank-Wolfe steps after each task, from the models' average.
        step: gamma_i = step * 2 / (i + 2), i from 0.
        scale: a step goes gamma_i * scale of the way to the model that is chosen.
        oracle: chosen is the model with the least inner product of gradient and weights, as in the
            paper, or with the least sum of cosines over weights, as in its code.
        granularity: one choice for the whole model, or one for every weight by itself.
    """

    needs = Needs(shardable=False)

    def __init__(
        self,
        memory: Count = 100,
        iterations: Count = 10,
        step: SomeShare = 0.1,
        scale: SomeShare = 0.3,
        oracle: Literal["inner", "cosine"] = "inner",
        granularity: Literal["model", "weight"] = "model",
    ) -> None:
        self.rule = FrankWolfe(iterations, step, scale, oracle, granularity)
        self.memory = memory
        self.models: list[dict[str, Tensor]] = []
        self.kept: Batch = {}

    @property
    def exemplars(self) -> int:
        """Samples of all tasks."""
        return len(next(iter(self.kept.values()))) if self.kept else 0

    def plan(self, stream: Stream, t: int) -> Plan:
        """Every task begins at theta_0."""
        return Plan(stream[t].train, start="initial")

    def setup(self, learner: Learner, task: Task) -> None:
        """What belongs to other tasks alone does not train."""
        learner.train_heads("current")

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """The model joins the pool, and the network becomes the merge."""
        weights, own = learner.weights(), own_heads(learner)
        shared = [name for name in learner.named_trainable() if name not in own]
        self.models.append({n: weights[n].clone() for n in (*shared, *running_names(weights))})
        drawn = task.sample(self.memory, learner.seed)
        self.kept = {
            k: torch.cat([self.kept[k], v]) if k in self.kept else v for k, v in drawn.items()
        }
        average = {
            n: torch.stack([model[n] for model in self.models]).mean(0).to(weights[n])
            for n in self.models[0]
        }

        def gradient(theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
            learner.load_weights({**weights, **average, **theta})
            return learner.gradients(self.kept)

        pool = [{n: model[n].to(weights[n]) for n in shared} for model in self.models]
        learner.train_heads("seen")  # old samples are answered by heads of their own
        merged = self.rule.merge({n: average[n] for n in shared}, pool, gradient)
        learner.load_weights({**weights, **average, **merged})

    def state_dict(self) -> State:
        """The models and the memory."""
        return {"models": [dict(model) for model in self.models], "kept": dict(self.kept)}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.models = [dict(model) for model in state["models"]]
        self.kept = dict(state["kept"])
