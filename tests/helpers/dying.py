"""Toy runs that die in the middle, as if their process had been killed."""

import functools

import pytest
import torch
from lightning import Trainer
from torch import nn
from torch.optim import SGD
from toys import DIM, make_stream, mlp

from cl_bench.contracts import UsageError
from cl_bench.experiment import (
    AlignmentSettings,
    Checkpoints,
    CheckpointSettings,
    EvalSettings,
    Identity,
    LoopSettings,
    Together,
    conduct,
)
from cl_bench.learners import Classifier
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.strategies.replay.er import ER
from cl_bench.tracking.files import LOCK
from runs import differences, final_weights


class Killed(BaseException):
    """The process is gone."""


class Dying:
    """Mixin of a learner: dies before the ``dies_at``-th batch, or at the start of a task."""

    dies_at = -1
    dies_in_task = None
    batches = 0

    def begin(self, task, strategy, start="current"):
        if task.index == self.dies_in_task:
            raise Killed
        super().begin(task, strategy, start)

    def _learn(self, batch):
        if self.batches == self.dies_at:
            raise Killed
        self.batches += 1
        return super()._learn(batch)


class Mortal(Dying, Classifier):
    """A classifier that does."""


sgd = functools.partial(SGD, lr=0.05)
momentum = functools.partial(SGD, lr=0.02, momentum=0.9)


def noisy():
    """Dropout and running statistics."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(DIM, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 16)
    )


def companions():
    return Together({"gpm": GPM(samples=20), "er": ER(memory=30)})


def learn(
    directory,
    strategy=Finetune,
    *,
    dies_at=-1,
    resume=False,
    optimizer=sgd,
    model=mlp,
    pack=1,
    every=4,
    keep=2,
    enabled=True,
    scenario="domain",
    sinks=(),
    num_workers=0,
    epochs=3,
    schedule=None,
    at_task="reset",
    resumes_inside=True,
    masters=None,
    **trainer_options,
):
    stream = make_stream(scenario, n=44)
    learner = Mortal(stream, model(), optimizer, 10, 0, pack)
    learner.dies_at = dies_at
    learner.at_task, learner.resumes_inside = at_task, resumes_inside
    if masters is not None:
        learner.keep_masters(masters)
    trainer = functools.partial(
        Trainer,
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **trainer_options,
    )
    made = strategy()
    conduct(
        stream,
        made,
        learner,
        trainer,
        Identity("toy", "strategy", "seed: 0\n", "python -m cl_bench"),
        loop=LoopSettings(0, 10, pack, num_workers, schedule),
        evaluation=EvalSettings(),
        alignment=AlignmentSettings(samples=20, batches=2),
        checkpoint=CheckpointSettings(enabled, every, keep),
        run_dir=directory,
        resume=resume,
        sinks=sinks,
    )
    return learner, made


def die(directory, *arguments, **options):
    with pytest.raises(Killed):
        learn(directory, *arguments, **options)


def names(directory):
    """Of the checkpoints that there are."""
    return [p.name for p in Checkpoints(directory, CheckpointSettings()).paths()]


def same(a, b):
    assert differences(a, b) == [], differences(a, b)
    assert final_weights(a) == final_weights(b)


def files(directory):
    """Everything but the lock, which dead processes leave."""
    return {
        str(p.relative_to(directory)): p.read_bytes()
        for p in sorted(directory.rglob("*"))
        if p.is_file() and p.name != LOCK
    }


def refuses(directory, match):
    """Resuming raises, and every file is as it was."""
    before = files(directory)
    with pytest.raises(UsageError, match=match):
        learn(directory, resume=True)
    assert files(directory) == before
