"""Processes that are there already: started by torchrun, SLURM, or our launcher."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from cl_bench.contracts import UsageError
from cl_bench.parallel.processes import end_with_parent
from cl_bench.parallel.rendezvous import STORE

SRUN = ".*`srun` command is available on your system but is not used.*"
"""Lightning's hint wherever Slurm is installed: a process that is to be one of several is told."""


def are_there() -> bool:
    """Whether this process was started as one of several."""
    return dist.is_initialized() or TorchElasticEnvironment.detect() or _in_slurm()


def _in_slurm() -> bool:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", SRUN)
        return SLURMEnvironment.detect() and SLURMEnvironment().world_size() > 1


@contextmanager
def joined(count: int, on_cuda: bool) -> Iterator[None]:
    """Inside, the processes that torchrun or SLURM started can talk to each other.

    Raises:
        UsageError: they are not ``count``.
    """
    if dist.is_initialized():
        yield
        return
    where = SLURMEnvironment() if _in_slurm() else TorchElasticEnvironment()
    if isinstance(where, TorchElasticEnvironment):
        end_with_parent()  # torchrun, or the process that was asked for several
    if where.world_size() != count:
        raise UsageError(
            f"{where.world_size()} processes were started, but trainer.devices times "
            f"trainer.num_nodes is {count}: make them equal"
        )
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = (
        where.main_address,
        str(where.main_port),
    )
    if on_cuda:
        torch.cuda.set_device(where.local_rank())
    store = os.environ.get(STORE)
    dist.init_process_group(
        "nccl" if on_cuda else "gloo",
        store=dist.FileStore(store, count) if store else None,  # type: ignore[attr-defined]
        rank=where.global_rank(),
        world_size=count,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
