"""What happens on the server, as functions of the global weights and of sums over clients."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cl_bench.contracts import FederatedStrategy, Statistics, Task
from cl_bench.federation.client import load_weights
from cl_bench.federation.settings import ServerOptimizer
from cl_bench.federation.upload import Upload
from cl_bench.learners import BaseLearner


class ServerOptimizerState:
    """The server's optimizer (Reddi et al., ICLR 2021) on weights that live outside of a module.

    Args:
        make: builds the optimizer; None adds the mean change as it is.
        weights: the global ones.
    """

    def __init__(self, make: ServerOptimizer | None, weights: Mapping[str, Tensor]) -> None:
        self._parameters: dict[str, nn.Parameter] = {}
        self.optimizer: Optimizer | None = None
        if make is not None:
            self._parameters = {k: nn.Parameter(v.clone()) for k, v in weights.items()}
            self.optimizer = make(list(self._parameters.values()))

    def change(
        self, weights: Mapping[str, Tensor], mean: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What the optimizer makes of the clients' mean change, the negative gradient."""
        if self.optimizer is None:
            return dict(mean)
        for name, parameter in self._parameters.items():
            parameter.grad = None if name not in mean else -mean[name]
            with torch.no_grad():
                parameter.copy_(weights[name])
        self.optimizer.step()
        return {name: self._parameters[name].detach() - weights[name] for name in mean}


def server_step(
    learner: BaseLearner,
    strategy: FederatedStrategy,
    weights: Mapping[str, Tensor],
    summed: Upload,
    optimizer: ServerOptimizerState,
) -> dict[str, Tensor]:
    """The next global weights: w^{r+1} = w^r + P(optimizer(mean change)).

    The strategy's projection comes last, since momentum or a preconditioner would lead out of the
    subspace again.

    Args:
        learner: holds the global weights.
        strategy: its ``server_update`` is P.
        weights: w^r.
        summed: over the clients of the round.
        optimizer: the server's.
    """
    n = summed.sums["weight"]
    mean = {
        name.removeprefix("update/"): value / n.to(value)
        for name, value in summed.sums.items()
        if name.startswith("update/")
    }
    update = strategy.server_update(learner, optimizer.change(weights, mean))
    return {k: w + update[k] if k in update else w for k, w in weights.items()}


def server_end_task(
    learner: BaseLearner,
    strategy: FederatedStrategy,
    weights: Mapping[str, Tensor],
    task: Task,
    summed: Statistics,
) -> None:
    """Take the summed statistics into the strategy's memory, at the global weights."""
    load_weights(learner, weights)
    strategy.consolidate(learner, task, summed)
