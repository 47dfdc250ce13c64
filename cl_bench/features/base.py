"""A network pre-trained on a stream's first task, where no pre-trained weights are at hand."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cl_bench.contracts import Stored, UsageError, generator
from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import Count, Rate, Seed, Strength
from cl_bench.data import alone, cached, digest

FORMAT = 1
"""Counts up whenever the same settings lead to other weights."""


@checked("backbone.base.")
@dataclass(frozen=True)
class BaseTraining:
    """How a backbone learns the base task: AdamW, the rate falling along a cosine.

    Attributes:
        epochs: over the first task's training data.
        lr: the highest rate.
        batch_size: samples of a step.
        weight_decay: decoupled.
        seed: of the order and of the head that is left behind; all runs share it.
    """

    epochs: Count = 20
    lr: Rate = 1e-3
    batch_size: Count = 64
    weight_decay: Strength = 0.05
    seed: Seed = 0


def train_on_base(
    network: nn.Module,
    stored: Stored,
    inputs: Callable[[Tensor], Tensor],
    recipe: BaseTraining,
    name: str,
    say: Callable[[str], None],
) -> None:
    """Give the network the weights that it learns with a linear head on a task's samples.

    They are kept in the cache under a hash of all that they depend on.

    Args:
        network: at its initial weights.
        stored: training data of the task.
        inputs: what the network takes, of rows of it.
        recipe: how it learns.
        name: of network and preprocessing.
        say: is told what takes long.

    Raises:
        UsageError: the loss is not finite.
    """
    parts = [FORMAT, name, digest(dict(network.state_dict())), asdict(recipe)]
    parts += [stored.samples.identity, digest({"rows": stored.rows, "y": stored.labels["y"]})]
    identity = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def build() -> dict[str, Tensor]:
        say(f"pre-training {name} on {len(stored.rows):,} samples of the first task")
        _train(network, stored, inputs, recipe)
        return {k: v.detach().clone() for k, v in network.state_dict().items()}

    with alone(f"base-{identity}", "each pre-train"):
        weights, _ = cached(f"base-{identity}", build)
    network.load_state_dict(weights)


def _train(
    network: nn.Module,
    stored: Stored,
    inputs: Callable[[Tensor], Tensor],
    recipe: BaseTraining,
) -> None:
    y = stored.labels["y"] - stored.labels["y"].min()
    rows = stored.rows
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network.eval()
        with torch.no_grad():
            width = network(inputs(rows[:2])).flatten(1).shape[1]
        head = nn.Linear(width, int(y.max()) + 1)
        network.train()
        steps = recipe.epochs * -(-len(rows) // recipe.batch_size)
        optimizer = torch.optim.AdamW(
            [*network.parameters(), *head.parameters()], recipe.lr, weight_decay=recipe.weight_decay
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for epoch in range(recipe.epochs):
            order = torch.randperm(len(rows), generator=generator(recipe.seed, "base", epoch))
            for index in torch.split(order, recipe.batch_size):
                loss = F.cross_entropy(head(network(inputs(rows[index])).flatten(1)), y[index])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
            if not bool(loss.isfinite()):
                raise UsageError(
                    f"backbone.base.lr={recipe.lr}: the loss became {float(loss)} in epoch "
                    f"{epoch + 1}; lower the rate"
                )
