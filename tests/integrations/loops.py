"""A plain loop and a LightningModule of somebody's own, on permuted digits."""

import functools

import lightning
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from lightning import Trainer
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.data import DataLoader, TensorDataset

from cl_bench.integrations import ContinualCallback, Guarded
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.tasks.permuted_digits import PermutedDigits

OPTIMIZERS = {
    "SGD": functools.partial(SGD, lr=0.1),
    "momentum": functools.partial(SGD, lr=0.02, momentum=0.9),
    "Adam": functools.partial(Adam, lr=2e-3),
    "AdamW": functools.partial(AdamW, lr=2e-3, weight_decay=0.1),
}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CL_BENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@functools.cache
def stream():
    return PermutedDigits(num_tasks=2)


@functools.cache
def data(t):
    batch = stream()[t].train[torch.arange(len(stream()[t].train))]
    return batch["x"], batch["y"]


def network(bias=True):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 40, bias=bias), nn.ReLU(), nn.Linear(40, 10, bias=bias)
    )


def normalised():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)
    )


def loop(model, optimizer, t, epochs=2, accumulate=1, clip=None, closure=False):
    """Somebody's training loop."""
    x, y = data(t)
    shuffle = torch.Generator().manual_seed(t)
    for _ in range(epochs):
        model.train()
        for i, rows in enumerate(torch.randperm(len(x), generator=shuffle).split(32), start=1):

            def loss(rows=rows):
                value = F.cross_entropy(model(x[rows]), y[rows])
                value.backward()
                return value

            if closure:

                def evaluate(loss=loss):
                    optimizer.zero_grad()
                    return loss()

                optimizer.step(evaluate)
                continue
            loss()
            if i % accumulate == 0:
                if clip:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()


def accuracy(model, t):
    batch = stream()[t].test[torch.arange(len(stream()[t].test))]
    model.eval()
    with torch.no_grad():
        return float((model(batch["x"]).argmax(1) == batch["y"]).double().mean())


def matrices(model):
    """[W | b] of every layer, as the strategy sees them."""
    return {
        name: torch.cat(
            [m.weight.detach().flatten(1), *([] if m.bias is None else [m.bias.detach()[:, None]])],
            dim=1,
        )
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d)
    }


def leaks(memory, before, after):
    """|dW M| / |dW| of every layer; it has moved, and it has something to stay away from."""
    found = {}
    for name, M in memory.items():
        change = (after[name] - before[name]).double()
        assert change.norm() > 1e-3
        assert 0 < M.shape[1] < M.shape[0]
        found[name] = float((change @ M).norm() / change.norm())
    return found


class Module(lightning.LightningModule):
    """Somebody's module."""

    def __init__(self, network, optimizer, manual=False):
        super().__init__()
        self.network = network
        self.make_optimizer = optimizer
        self.automatic_optimization = not manual

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


def trainer(*callbacks, epochs=2, **options):
    options = {"logger": False, "enable_checkpointing": False, **options}
    return Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def loader(t):
    shuffle = torch.Generator().manual_seed(t)
    return DataLoader(TensorDataset(*data(t)), batch_size=32, shuffle=True, generator=shuffle)


def guard_of(strategy, t, **options):
    return ContinualCallback(strategy, sample=data(t), task=t, **options)


# -- the invariant --------------------------------------------------------------------------------


def second_task(model, optimizer, strategy=None, **options):
    """Two tasks with one optimizer; the leaks of the second."""
    strategy = strategy or GPM(threshold=0.97)
    guard = Guarded(model, strategy)
    with guard.task(optimizer, sample=data(0)):
        loop(model, optimizer, 0, **options)
    memory, before = dict(strategy.memory), matrices(model)
    with guard.task(optimizer, sample=data(1)):
        loop(model, optimizer, 1, **options)
    return leaks(memory, before, matrices(model))


# -- the model is left as it was found ------------------------------------------------------------


def condition(model):
    return (
        list(model.state_dict()),
        [(name, type(m), m.training) for name, m in model.named_modules()],
        [(name, p.requires_grad) for name, p in model.named_parameters()],
        [sorted(m.__dict__) for m in model.modules()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
    )


def hooks(optimizer):
    found = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    everywhere = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)
    return sum(map(len, (*found, *everywhere)))
