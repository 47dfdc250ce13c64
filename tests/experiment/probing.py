"""Toy runs with every probe on."""

import functools

import torch
from dying import Mortal, noisy
from lightning import Trainer
from torch.optim import SGD, AdamW
from toys import make_stream, mlp

from cl_bench.contracts import Recovery, generator
from cl_bench.data import MemoryData
from cl_bench.experiment import (
    AlignmentSettings,
    CheckpointSettings,
    EvalSettings,
    Identity,
    LoopSettings,
    ProbeSettings,
    conduct,
)
from cl_bench.experiment.probes.features import FeatureSettings
from cl_bench.experiment.probes.landscape import LandscapeSettings
from cl_bench.experiment.probes.recovery import RecoverySettings
from cl_bench.experiment.probes.updates import UpdateSettings
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.isolation.freeze import Freeze
from cl_bench.strategies.merging.task_vector import TaskVector
from cl_bench.strategies.penalty.ewc import EWC
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.strategies.projection.rogo import ROGO
from cl_bench.strategies.projection.trgp import TRGP
from cl_bench.strategies.replay.er import ER
from cl_bench.tracking import read_results

PROBES = ProbeSettings(
    early=(2, 5),
    updates=UpdateSettings(True),
    features=FeatureSettings(True, samples=12, components=2),
    recovery=RecoverySettings(True, steps=3, samples=20, at=[0, 4]),
    landscape=LandscapeSettings(True, samples=10, along_early=(-1, 1, 3), along_late=(0, 1, 2)),
)
DENSE = EvalSettings(dense=[0, 1, 3, 8], dense_samples=20)
NOTHING = ProbeSettings()

sgd = functools.partial(SGD, lr=0.05)
adamw = functools.partial(AdamW, lr=1e-2, weight_decay=0.1)


def halved(stream):
    """The stream, its tasks with halves; the control is noise that no label belongs to."""
    for task in stream:
        order = torch.arange(len(task.data))
        noise = dict(task.data[order])
        noise["x"] = torch.randn(noise["x"].shape, generator=generator(0, "noise", task.index))
        parts = [MemoryData(task.data[order[i::2]]) for i in (0, 1)]
        task.recovery = Recovery(*parts, MemoryData(noise), 1.0)
    return stream


def run(
    directory,
    strategy=Finetune,
    *,
    probe=PROBES,
    evaluation=DENSE,
    optimizer=sgd,
    model=mlp,
    scenario="domain",
    dies_at=-1,
    resume=False,
    stream=None,
    pack=1,
    **options,
):
    stream = stream or halved(make_stream(scenario, n=44))
    learner = Mortal(stream, model(), optimizer, 10, 0, pack)
    learner.dies_at = dies_at
    trainer = functools.partial(
        Trainer,
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    conduct(
        stream,
        strategy(),
        learner,
        trainer,
        Identity("toy", "strategy", "seed: 0\n", "python -m cl_bench"),
        loop=LoopSettings(0, 10, pack),
        evaluation=evaluation,
        alignment=AlignmentSettings(samples=20, batches=2),
        probe=probe,
        checkpoint=CheckpointSettings(True, 4, 2),
        run_dir=directory,
        resume=resume,
    )
    return stream, learner


def probes(directory, name):
    events = [e for e in read_results(directory) if e["event"] == "probe"]
    return [e for e in events if e["probe"] == name]


CASES = {
    "finetune": {"strategy": Finetune, "optimizer": adamw, "model": noisy},
    "accumulating": {"strategy": Finetune, "accumulate_grad_batches": 2},
    "gpm": {"strategy": functools.partial(GPM, samples=20)},
    "gpm-adamw": {"strategy": functools.partial(GPM, samples=20), "optimizer": adamw},
    "rogo": {"strategy": functools.partial(ROGO, samples=20, relax_samples=20, cosine=0.3)},
    "trgp": {"strategy": functools.partial(TRGP, samples=20), "scenario": "task"},
    "er": {"strategy": functools.partial(ER, memory=30), "scenario": "class"},
    "ewc": {"strategy": functools.partial(EWC, samples=20)},
    "freeze": {"strategy": Freeze, "optimizer": adamw, "model": noisy},
    "task_vector": {"strategy": functools.partial(TaskVector, epoch=1)},
}
