"""The outer loop, the engine under it, and what watches them."""

from cl_bench.experiment.checkpoint import Checkpoints, CheckpointSettings
from cl_bench.experiment.checks import (
    check_batches,
    check_epochs,
    check_pair,
    check_schedule,
    check_tasks,
    takes_no_steps,
)
from cl_bench.experiment.companions import Together
from cl_bench.experiment.conduct import Result, conduct
from cl_bench.experiment.engine import LightningEngine
from cl_bench.experiment.experiment import EvalSettings, Experiment
from cl_bench.experiment.identity import Identity, new_directory
from cl_bench.experiment.loader import EvalLoader, TrainLoader
from cl_bench.experiment.loop import LoopSettings
from cl_bench.experiment.observer import AlignmentObserver, AlignmentSettings
from cl_bench.experiment.plateau import Cosine, PerStep, Plateau, Warmup
from cl_bench.experiment.pretrain import Pretrained, pretrain
from cl_bench.experiment.probes import ProbeSettings, check_watch
from cl_bench.experiment.search import SealedError, SearchSettings, for_search, search_facts
from cl_bench.experiment.trainer_checks import (
    check_sharded,
    check_together,
    check_trainer,
    processes,
    shares_weights,
)
from cl_bench.experiment.trainers import quiet_lightning, seed_training

__all__ = [
    "AlignmentObserver",
    "AlignmentSettings",
    "CheckpointSettings",
    "Checkpoints",
    "Cosine",
    "EvalLoader",
    "EvalSettings",
    "Experiment",
    "Identity",
    "LightningEngine",
    "LoopSettings",
    "PerStep",
    "Plateau",
    "Pretrained",
    "ProbeSettings",
    "Result",
    "SealedError",
    "SearchSettings",
    "Together",
    "TrainLoader",
    "Warmup",
    "check_batches",
    "check_epochs",
    "check_pair",
    "check_schedule",
    "check_sharded",
    "check_tasks",
    "check_together",
    "check_trainer",
    "check_watch",
    "conduct",
    "for_search",
    "new_directory",
    "pretrain",
    "processes",
    "quiet_lightning",
    "search_facts",
    "seed_training",
    "shares_weights",
    "takes_no_steps",
]
