"""A run in several processes: started here from its resolved configuration, and read afterwards.

Under torchrun or SLURM the processes are there: they find each other
(:mod:`cl_bench.parallel.joining`).
"""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from cl_bench.contracts import Strategy
from cl_bench.experiment import Result
from cl_bench.experiment.checkpoint import Checkpoints, CheckpointSettings, read_checkpoint
from cl_bench.experiment.reopen import Resume
from cl_bench.learners import BaseLearner
from cl_bench.parallel.launch import launch
from cl_bench.tracking import read_matrix
from cl_bench.tracking.files import SUMMARY


def start(
    cfg: DictConfig,
    command: str,
    choices: Mapping[str, Any],
    resume: Resume,
    run_dir: Path,
    count: int,
    learner: BaseLearner,
    strategy: Strategy,
    notes: Sequence[str] = (),
) -> Result:
    """Run the experiment in ``count`` processes on this machine, and read what it left.

    Args:
        cfg: the resolved configuration.
        command: the command line.
        choices: which option of each configuration group was chosen.
        resume: go on with the run in ``run_dir``.
        run_dir: where the run's files are, or will be.
        count: processes.
        learner: takes the final weights from the run's last checkpoint, if it wrote any.
        strategy: takes its memory from there.
        notes: said where the run begins.

    Raises:
        UsageError: what a process says is wrong; or one died, and the others were ended.
        Stopped: a signal ended them all.
    """
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    config["run_dir"] = str(run_dir)
    job = {
        "config": config,
        "command": command,
        "choices": dict(choices),
        "resume": resume,
        "notes": list(notes),
        "threads": torch.get_num_threads(),
    }
    launch("cl_bench.cli.worker", job, count, functools.partial(_left_behind, run_dir))
    return read_result(run_dir, learner, strategy)


def _left_behind(run_dir: Path) -> str:
    if Checkpoints(run_dir, CheckpointSettings()).paths():
        return f"go on with: python -m cl_bench resume={run_dir}"
    return f"results so far are in {run_dir}"


def read_result(run_dir: Path, learner: BaseLearner, strategy: Strategy) -> Result:
    """A finished run from its files; learner and strategy come from its last checkpoint."""
    _, matrix = read_matrix(run_dir)
    for path in Checkpoints(run_dir, CheckpointSettings()).paths()[-1:]:
        end = read_checkpoint(path)["start"]
        learner.load_state_dict(end["weights"])
        strategy.load_state_dict(end["strategy"])
    summary = json.loads((run_dir / SUMMARY).read_text())
    return Result(run_dir, matrix, summary, learner, strategy)
