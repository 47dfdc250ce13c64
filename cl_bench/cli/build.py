"""From a composed configuration to a run."""

import functools
import inspect
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from cl_bench.contracts import Strategy, UsageError
from cl_bench.experiment import (
    AlignmentObserver,
    AlignmentSettings,
    EvalSettings,
    Experiment,
    LightningEngine,
    LoopSettings,
    Together,
    check_pair,
    check_trainer,
    seed_training,
)
from cl_bench.report import print_run, write_figures
from cl_bench.tracking import ProgressDisplay, Record, wandb_sink


def run_config(cfg: DictConfig, command: str, choices: Mapping[str, Any]) -> float:
    """Run one experiment.

    Args:
        cfg: the composed configuration.
        command: the command line that leads to it.
        choices: which option of each group was chosen.

    Returns:
        Final average accuracy in [0, 1].

    Raises:
        UsageError: whatever the user can put right.
    """
    raise NotImplementedError
