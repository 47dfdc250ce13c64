"""The disk that a run will take, added up before it starts."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from cl_bench.contracts import UsageError
from cl_bench.experiment.checkpoint import CheckpointSettings
from cl_bench.learners import BaseLearner
from cl_bench.optimizers import OptimizerFactory

WORTH_SAYING = 10**9
"""Bytes from which on people are told."""


@dataclass(frozen=True)
class Disk:
    """Bytes; without the record itself, and without what a strategy remembers.

    Attributes:
        weights: of the network, after every task.
        checkpoints: as many as stay and the one that is being written, each inside a task.
        free: on the disk of the run's directory.
    """

    weights: int
    checkpoints: int
    free: int

    @property
    def total(self) -> int:
        """What the run will take."""
        return self.weights + self.checkpoints

    def lines(self) -> list[str]:
        """For people, where it is worth saying."""
        if self.total < WORTH_SAYING:
            return []
        parts = f"weights {_gb(self.weights)}, checkpoints {_gb(self.checkpoints)}"
        return [
            f"disk: this run will take up to {_gb(self.total)} ({parts}), and more for memories"
        ]

    def require_room(self) -> None:
        """Raise :class:`UsageError` if there is not as much."""
        if self.total > self.free:
            raise UsageError(
                f"the run will take {_gb(self.total)} of disk (weights after every task "
                f"{_gb(self.weights)}, checkpoints {_gb(self.checkpoints)}), and {_gb(self.free)} "
                "are free: use checkpoint.weights=last, checkpoint.every_steps=null, "
                "checkpoint.keep=1, or another run_dir"
            )


def disk(
    learner: BaseLearner,
    optimizer: OptimizerFactory,
    settings: CheckpointSettings,
    tasks: int,
    directory: Path,
) -> Disk:
    """What a run of so many tasks will take.

    Args:
        learner: whose weights are kept.
        optimizer: builds what trains them.
        settings: of checkpoints.
        tasks: how many are learned.
        directory: of the run, which need not be there yet.
    """
    there = next(p for p in (directory.absolute(), *directory.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if not settings.enabled:
        return Disk(0, 0, free)
    tensors = {id(t): t for t in learner.state_dict(keep_vars=True).values()}.values()
    weights = sum(t.numel() * t.element_size() for t in tensors)
    trained = sum(p.numel() * p.element_size() for p in learner.parameters() if p.requires_grad)
    inside = weights + int(trained * states(optimizer)) if settings.every_steps else 0
    rows = tasks + 1 if settings.weights == "all" else 0
    return Disk(rows * weights, (settings.keep + 1) * (weights + inside), free)


def states(optimizer: OptimizerFactory) -> float:
    """Numbers that an optimizer keeps of a matrix, as a multiple of the matrix's own.

    As many as Adam's for one that only steps in a way of its own.
    """
    matrix = nn.Parameter(torch.zeros(8, 8))
    matrix.grad = torch.zeros_like(matrix)
    try:
        made = optimizer([{"params": [matrix]}])
        made.step()
    except Exception:
        return 2.0
    kept = [v for v in made.state[matrix].values() if isinstance(v, torch.Tensor) and v.dim()]
    return sum(v.numel() for v in kept) / matrix.numel()


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
