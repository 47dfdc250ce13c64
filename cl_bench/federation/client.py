"""What happens on a client, as functions of what it is sent and of its own data."""

import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cl_bench.contracts import FederatedStrategy, State, batch_sizes, derive_seed, generator
from cl_bench.experiment.loader import in_training
from cl_bench.federation.partition import ClientTask, in_order
from cl_bench.federation.upload import Upload, floating
from cl_bench.learners import BaseLearner, DivergedError
from cl_bench.packed import ShortSteps


@dataclass(frozen=True)
class Turn:
    """Which client does something, and when; all randomness on it follows from this.

    Attributes:
        seed: of the run.
        task: index of the task.
        round: of the task, from 0.
        client: its number.
    """

    seed: int
    task: int
    round: int
    client: int

    def derive(self, purpose: str) -> int:
        """A seed for one purpose, different in every turn."""
        return derive_seed(self.seed, purpose, self.task, self.round, self.client)

    @property
    def own_seed(self) -> int:
        """The client's seed for what its strategy draws, the same in all its turns."""
        return derive_seed(self.seed, "client", self.client)


def load_weights(learner: BaseLearner, weights: Mapping[str, Tensor]) -> None:
    """Put weights into the one model instance, in place."""
    held = floating(learner.state_dict())
    _copy(weights, held)


@torch.no_grad()
def _copy(weights: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        held[name].copy_(weight)


def seed_device(seed: int, device: torch.device) -> None:
    """Seed what dropout and the like draw from; ``torch.manual_seed`` is slow, as it seeds all."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def client_fit(
    learner: BaseLearner,
    strategy: FederatedStrategy,
    weights: Mapping[str, Tensor],
    task: ClientTask,
    turn: Turn,
    local_epochs: int,
    by_samples: bool = False,
) -> Upload:
    """Learn the client's data for some epochs, starting from the global weights.

    Args:
        learner: the model instance to work in; holds the client's weights afterwards.
        strategy: with its state as the client knows it.
        weights: the global ones, by name.
        task: with the client's data.
        turn: who and when.
        local_epochs: E.
        by_samples: weight the change by the client's number of samples n_k instead of by 1.

    Returns:
        ``update/<name>`` = n (w_k - w^r), of what was trained and of float buffers; ``weight`` = n;
        ``loss`` and ``terms``, its sum over samples and their number, every epoch's.

    Raises:
        DivergedError: a loss is not finite.
    """
    begun = time.perf_counter()
    learner.equip(strategy)
    everything = floating(learner.state_dict())
    _copy(weights, everything)
    learner.seed = turn.own_seed
    learner.begin(task, strategy)
    learner.train()
    optimizer = learner.configure_optimizers()
    steps, constrain = ShortSteps(optimizer), functools.partial(strategy.constrain, learner)
    device = steps.trained[0].device
    seed_device(turn.derive("fit"), device)
    losses, terms = [], []
    sizes = batch_sizes(len(task.train), learner.batch_size, learner.least_batch)
    for epoch in range(local_epochs):
        learner.stand(None, epoch, local_epochs, local_epochs * len(sizes))
        now = (turn.task, turn.round, turn.client, epoch)
        rng = generator(turn.seed, "order", *now)
        order = torch.randperm(len(task.train), generator=rng)
        data = in_training(task.train, strategy.needs, derive_seed(turn.seed, "augment", *now))
        for batch in in_order(data, order, learner.batch_size, learner.least_batch):
            if device.type != "cpu":
                batch = {name: value.to(device) for name, value in batch.items()}
            loss, count = learner.step_loss(batch)
            steps.take(loss, constrain)
            losses.append(loss.detach())
            terms.append(float(count))
    strategy.release(learner)
    seen = torch.stack(losses)
    if not bool(seen.isfinite().all()):
        raise DivergedError(
            f"the loss became {seen[~seen.isfinite()][0].item()} on client {turn.client} in round "
            f"{turn.round + 1} of task {task.name!r}; lower the learning rate (optimizer.lr=...); "
            "results so far are kept"
        )
    n = float(len(task.train)) if by_samples else 1.0
    changed = {id(p) for p in steps.trained}
    parameters = {name for name, p in learner.named_parameters() if id(p) not in changed}
    held = {k: v for k, v in everything.items() if k not in parameters}
    sums = {f"update/{name}": n * (after - weights[name]) for name, after in held.items()}
    sums["weight"] = torch.tensor(n, dtype=torch.float64)
    counts = torch.tensor(terms, dtype=torch.float64)
    sums["loss"] = (seen.double() * counts.to(seen.device)).sum()
    sums["terms"] = counts.sum()
    return Upload(sums, len(losses), time.perf_counter() - begun)


def client_statistics(
    learner: BaseLearner,
    strategy: FederatedStrategy,
    weights: Mapping[str, Tensor],
    task: ClientTask,
    turn: Turn,
) -> Upload:
    """What the client's data tells about a finished task, as tensors that add up.

    Args:
        learner: the model instance to work in.
        strategy: with the memory that the server shared.
        weights: of the model that the inputs are seen by.
        task: with the client's data.
        turn: who and when.

    Raises:
        TypeError: the strategy collects something else than tensors.
    """
    begun = time.perf_counter()
    learner.equip(strategy)
    load_weights(learner, weights)
    learner.seed = turn.own_seed
    learner.begin(task, strategy)
    seed_device(turn.derive("statistics"), next(learner.parameters()).device)
    collected: Mapping[str, Any] = strategy.collect(learner, task)
    strategy.release(learner)
    for name, value in collected.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{type(strategy).__name__}.collect gives a {type(value).__name__} as {name!r}: "
                "clients send tensors"
            )
    return Upload(dict(collected), 0, time.perf_counter() - begun)


def client_weights(learner: BaseLearner) -> State:
    """A copy of what the model instance holds now."""
    return {name: value.clone() for name, value in floating(learner.state_dict()).items()}
