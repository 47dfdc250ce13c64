"""Several processes that train together: started here, or found to be there already.

A run that wants several (``trainer=ddp``) is started again, once a process, from its resolved
configuration. Under torchrun or SLURM the processes are there: they find each other.
"""

import json
import logging
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from omegaconf import DictConfig, OmegaConf
from torch._C._distributed_c10d import FileStore
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from cl_bench.cli.output import patient_output
from cl_bench.cli.rendezvous import STORE, OneMachine, alone_together
from cl_bench.cli.signals import Stopped
from cl_bench.cli.sweep import ourselves
from cl_bench.cli.threads import computing_with
from cl_bench.cli.workers import end_with_parent
from cl_bench.contracts import Strategy, UsageError
from cl_bench.ends import ending_signals
from cl_bench.experiment import Result
from cl_bench.experiment.checkpoint import Checkpoints, CheckpointSettings, read_checkpoint
from cl_bench.experiment.reopen import Resume
from cl_bench.learners import BaseLearner
from cl_bench.tracking import read_matrix
from cl_bench.tracking.files import SUMMARY

ERROR = "error.txt"
TRACEBACK = "-traceback.txt"


def are_there() -> bool:
    """Whether this process was started as one of several."""
    return dist.is_initialized() or TorchElasticEnvironment.detect() or _in_slurm()


def _in_slurm() -> bool:
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
        store=FileStore(store, count) if store else None,
        rank=where.global_rank(),
        world_size=count,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


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
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.json"
        config: Any = OmegaConf.to_container(cfg, resolve=True)
        config["run_dir"] = str(run_dir)
        job.write_text(
            json.dumps(
                {
                    "config": config,
                    "command": command,
                    "choices": dict(choices),
                    "resume": resume,
                    "notes": list(notes),
                    "threads": torch.get_num_threads(),
                    "starter": ourselves(),
                }
            )
        )
        settings = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id="cl_bench",
            rdzv_backend=OneMachine.get_backend(),
            max_restarts=0,
        )
        logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # we tell it ourselves
        try:
            with alone_together(Path(folder)):
                # -P: modules come from where this process finds them, not from the working
                # directory, which a record may have named.
                elastic_launch(settings, sys.executable)(
                    "-P", "-m", "cl_bench.cli.together", str(job)
                )
        except SignalException as stopped:
            error = Stopped(stopped.sigval)
            error.add_note(_go_on(run_dir))
            raise error from None
        except ChildFailedError as failed:
            raise _stopped(failed, run_dir) or _explained(
                failed, Path(folder) / ERROR, run_dir, count
            ) from None
    return read_result(run_dir, learner, strategy)


def _stopped(failed: ChildFailedError, run_dir: Path) -> Stopped | None:
    """What to raise where a signal to one of them ended all in order."""
    statuses = {failure.exitcode for failure in failed.failures.values()}
    for number in ending_signals():
        if statuses == {128 + number}:
            error = Stopped(number)
            error.add_note(_go_on(run_dir))
            return error
    return None


def _explained(failed: ChildFailedError, told: Path, run_dir: Path, count: int) -> UsageError:
    if told.exists():
        return UsageError(told.read_text())
    # When one is killed the others fail too, for want of it.
    killed = [(n, f) for n, f in failed.failures.items() if f.exitcode < 0]
    number, failure = (killed or [failed.get_first_failure()])[0]
    how = f"exit status {failure.exitcode}"
    if killed:
        how = f"signal {signal.Signals(-failure.exitcode).name}"
    else:
        for text in sorted(told.parent.glob(f"*{TRACEBACK}")):
            print(f"{text.name.removesuffix(TRACEBACK)}: {text.read_text()}", file=sys.stderr)
    return UsageError(
        f"process {number} of {count} ended with {how}, and the others were stopped; "
        f"{_go_on(run_dir)}"
    )


def _go_on(run_dir: Path) -> str:
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


def main(job: Path) -> int:
    """One of the processes."""
    from cl_bench.cli.build import run_config
    from cl_bench.cli.signals import stopping

    given = json.loads(job.read_text())
    end_with_parent(given["starter"])
    try:
        with patient_output(), stopping(), computing_with(given["threads"]):
            run_config(
                OmegaConf.create(given["config"]),
                given["command"],
                given["choices"],
                given["resume"],
                notes=given["notes"],
            )
    except Stopped as stopped:
        return stopped.exit_status
    except UsageError as error:
        notes = "; ".join(getattr(error, "__notes__", []))
        partial = job.with_name(f"{os.getpid()}.txt")
        partial.write_text(f"{error}\n{notes}".strip())
        partial.replace(job.with_name(ERROR))
        return 2
    except Exception:
        where = os.environ.get("RANK", "0")
        job.with_name(f"process {where}{TRACEBACK}").write_text(traceback.format_exc())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
