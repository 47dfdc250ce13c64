"""Runs that die in several processes, for ``tests/parallel/test_going_on.py``.

python -m torch.distributed.run --standalone --nproc-per-node=4 \\
    tests/helpers/dying_together.py DIR interrupted|waiting|go_on
"""

import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from together import cut_short, goes_on, run

from cl_bench.experiment import Checkpoints, CheckpointSettings
from cl_bench.experiment.checkpoint import FORMAT, read_checkpoint, write_checkpoint
from cl_bench.parallel.ranks import rank

INTERRUPTED = (
    *("gpm-adam", "rogo-adam", "o_lora", "task_vector", "ewc"),
    *("adaptive_svd", "adaptive_svd-dense", "adaptive_svd-factored", "finetune-clipped"),
)
GATHERED = ("adaptive_svd", "task_vector", "finetune-clipped")
MOMENTS = range(4, 100, 10)
"""Batches of a hundred before which a run dies: within epochs, tasks, and between them."""
WAITING = 64
"""That before which a run dies that other processes go on with."""


def as_older_versions_wrote(directory):
    """The last checkpoint of a run, its tensors gathered in the one file."""
    path = Checkpoints(directory, CheckpointSettings()).paths()[-1]
    state = read_checkpoint(path)
    state = {**state, "format": FORMAT}
    del state["rows"]
    shutil.rmtree(path.with_suffix(".rows"))
    with path.open("w+b") as file:
        write_checkpoint(file, state)


def gathered(name, directory):
    """A run that dies and goes on from a checkpoint of an older version."""
    cut_short(name, directory, WAITING)
    if rank() == 0:
        as_older_versions_wrote(directory)
    dist.barrier()
    return goes_on(name, directory)


def interrupted(directory):
    """Runs that are never disturbed, and that die and go on."""
    for name in INTERRUPTED:
        found = run(name, directory / f"{name}-whole", sharded=True, every_steps=7)
        torch.save(found, directory / f"{name}-whole-rank{rank()}.pt")
        for moment in MOMENTS:
            cut_short(name, directory / f"{name}-{moment}", moment)
            found = goes_on(name, directory / f"{name}-{moment}")
            torch.save(found, directory / f"{name}-{moment}-rank{rank()}.pt")
        if name in GATHERED:
            found = gathered(name, directory / f"{name}-gathered")
            torch.save(found, directory / f"{name}-gathered-rank{rank()}.pt")


def waiting(directory):
    """Runs that die, for others to go on with."""
    for name in INTERRUPTED:
        cut_short(name, directory / f"{name}-waiting", WAITING)


def go_on(directory):
    """What others have begun."""
    for name in INTERRUPTED:
        found = goes_on(name, directory / f"{name}-waiting")
        torch.save(found, directory / f"{name}-waiting-rank{rank()}.pt")


def main(directory, what):
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    {"interrupted": interrupted, "waiting": waiting, "go_on": go_on}[what](directory)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
