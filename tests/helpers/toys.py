"""Streams of a few dozen samples, small networks, and the inner loop of the docs in ten lines."""

import functools

import torch
from lightning import Trainer
from torch import nn
from torch.optim import SGD

from cl_bench.contracts import Origin, Stream, generator
from cl_bench.experiment import LightningEngine, LoopSettings, TrainLoader
from cl_bench.learners import Classifier
from cl_bench.models import MLP
from cl_bench.tasks.tensors import TensorTask

ORIGIN = Origin(source="generated", licence="none", citation="none")
DIM, WIDTH, CLASSES = 12, 24, 3


class ToyTask(TensorTask):
    """One set of samples for everything."""

    def __init__(self, index, head, classes, x, y):
        super().__init__(index, (x, y), name=f"t{index}", classes=classes, head=head, origin=ORIGIN)
        self.data = self._train

    @property
    def train(self):
        return self.data

    validation = test = train

    @property
    def everything(self):
        return self.data[torch.arange(len(self.data))]


def make_stream(scenario="domain", tasks=3, n=40, shape=(DIM,), subspace=5, seed=0):
    """Gaussian classes; each task's inputs fill ``subspace`` random dimensions (None: all)."""
    made, d = [], torch.Size(shape).numel()
    for t in range(tasks):
        rng = generator(seed, "toy", t)
        y = torch.arange(n) % CLASSES
        inside = subspace or d
        centres = 2 * torch.randn(CLASSES, inside, generator=rng)
        z = centres[y] + 0.3 * torch.randn(n, inside, generator=rng)
        directions = torch.linalg.qr(torch.randn(d, inside, generator=rng))[0]
        x = (z @ directions.t()).reshape(n, *shape)
        head = 0 if scenario == "domain" else t
        classes = range(head * CLASSES, (head + 1) * CLASSES)
        made.append(ToyTask(t, head, classes, x, y + classes.start))
    return Stream("toy", made, scenario, tuple(shape), "toy")


def mlp(bias=False, hidden=(WIDTH, WIDTH)):
    torch.manual_seed(1)
    return MLP((DIM,), hidden, bias)


IMAGE = (2, 6, 6)


def cnn(bias=True):
    """Convolutions with padding, groups, stride and dilation."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=bias),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, stride=2, groups=2, padding="valid", bias=bias),
        nn.ReLU(),
        nn.Conv2d(8, 6, 2, dilation=1, padding="same", padding_mode="circular", bias=bias),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 16, bias=bias),
        nn.ReLU(),
    )


def make_learner(stream, model=None, optimizer=None, batch_size=10, seed=0, **options):
    optimizer = optimizer or functools.partial(SGD, lr=0.05)
    model = mlp() if model is None else model
    return Classifier(stream, model, optimizer, batch_size, seed, **options)


def learn(learner, strategy, task, epochs=5, data=None, batch_size=10):
    """One task in a plain loop; returns its optimizer."""
    learner.begin(task, strategy)
    learner.train()
    optimizer = learner.configure_optimizers()
    loader = TrainLoader(data or task.train, batch_size, 0, task.index)
    for _ in range(epochs):
        for i, batch in enumerate(loader):
            loss = learner.training_step(batch, i)
            optimizer.zero_grad()
            loss.backward()
            strategy.constrain(learner)
            optimizer.step()
    strategy.consolidate(learner, task, strategy.collect(learner, task))
    strategy.release(learner)
    return optimizer


def learn_stream(learner, strategy, stream, epochs=5, **options):
    for t, task in enumerate(stream):
        learn(learner, strategy, task, epochs, strategy.plan(stream, t).data, **options)


class Silent:
    """A record and a display that keep nothing."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def make_engine(learner, strategy, epochs=2, pack=1, batch_size=10, **options):
    """The package's own inner loop."""
    trainer = functools.partial(
        Trainer,
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    loop = LoopSettings(batch_size=batch_size, pack=pack)
    return LightningEngine(learner, strategy, trainer, loop, None, Silent(), Silent())


def weights(learner):
    return {name: p.detach().clone() for name, p in learner.named_parameters()}


def accuracy(learner, task):
    learner.eval()
    batch = task.everything
    with torch.no_grad():
        return float(learner.score(learner(batch), batch).mean())
