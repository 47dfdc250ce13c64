"""A small world of biographies, and tiny causal models that learn it."""

import functools

import torch
from torch.optim import AdamW
from toys import Silent

from cl_bench.experiment import LightningEngine, LoopSettings, pretrain
from cl_bench.learners import Causal
from cl_bench.models import gpt
from cl_bench.tasks.biography import Biography

WORLD = {
    "people": 40,
    "new_people": 12,
    "strangers": 4,
    "attributes": {"university": 6, "major": 8},
    "names": [20, 20, 20],
    "templates": 3,
    "variants": 2,
}


@functools.cache
def world(pretrained=False):
    recipe = {"steps": 4, "batch_size": 4, "length": 48} if pretrained else None
    return Biography(**WORLD, pretrain=recipe)


def make_model(architecture="gpt_neox", depth=2, tied=False, vocabulary=None, **options):
    torch.manual_seed(1)
    size = vocabulary or len(world().vocabulary)
    return gpt(size, architecture, depth=depth, width=16, heads=2, context=64, tied=tied, **options)


def make_causal(architecture="gpt_neox", optimizer=None, stream=None, **options):
    stream = stream or world()
    factory = optimizer or functools.partial(AdamW, lr=1e-2, weight_decay=0.1)
    return Causal(stream, make_model(architecture, **options), factory, batch_size=8, seed=0)


class _Trainer:
    """Builds quiet CPU Trainers."""

    def __call__(self, callbacks=(), **options):
        from lightning import Trainer

        return Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
            **({"max_epochs": 1} | options),
        )


def learn(learner, strategy, stream, epochs=1):
    """The stream's tasks, one after another, through the engine."""
    trainer = functools.partial(_Trainer().__call__, max_epochs=epochs)
    engine = LightningEngine(
        learner, strategy, trainer, LoopSettings(0, 8), None, Silent(), Silent()
    )
    for t, task in enumerate(stream):
        engine.learn(task, strategy.plan(stream, t))
    return engine


def snapshot(learner):
    return {name: p.detach().clone() for name, p in learner.named_parameters()}


def batch_of(data, *rows):
    return data[torch.tensor(rows)]


def pretrained(seed=0, recipe=None, **options):
    stream = world(pretrained=True)
    learner = make_causal(stream=stream, **options)
    found = pretrain(learner, recipe or stream.pretraining, _Trainer(), seed, Silent())
    return learner, found
