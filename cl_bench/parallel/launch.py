"""Starting several processes on this machine that do one job together, and hearing how it ended.

The job is handed over as data, in a file. Each process answers by its exit status, and where
something is wrong by a file beside the job.
"""

import json
import logging
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from cl_bench.contracts import UsageError
from cl_bench.ends import Stopped, ending_signals
from cl_bench.parallel.processes import end_with_parent, ourselves
from cl_bench.parallel.rendezvous import OneMachine, alone_together

ERROR = "error.txt"
TRACEBACK = "-traceback.txt"


def launch(module: str, job: Mapping[str, Any], count: int, left_behind: Callable[[], str]) -> None:
    """Have ``count`` processes on this machine do a job together, and wait for them.

    Args:
        module: what each of them runs, as ``python -m`` does, with the job's file for argument; it
            passes that on to :func:`carry_out`.
        job: in JSON's types.
        count: processes.
        left_behind: says where the job's results are when it ended early, and how to go on.

    Raises:
        UsageError: what a process says is wrong; or one died, and the others were ended.
        Stopped: a signal ended them all.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps({**job, "starter": ourselves()}))
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
                elastic_launch(settings, sys.executable)("-P", "-m", module, str(path))
        except SignalException as stopped:
            error = Stopped(stopped.sigval)
            error.add_note(left_behind())
            raise error from None
        except ChildFailedError as failed:
            raise _stopped(failed, left_behind) or _explained(
                failed, Path(folder) / ERROR, count, left_behind
            ) from None


def _stopped(failed: ChildFailedError, left_behind: Callable[[], str]) -> Stopped | None:
    """What to raise where a signal to one of them ended all in order."""
    statuses = {failure.exitcode for failure in failed.failures.values()}
    for number in ending_signals():
        if statuses == {128 + number}:
            error = Stopped(number)
            error.add_note(left_behind())
            return error
    return None


def _explained(
    failed: ChildFailedError, told: Path, count: int, left_behind: Callable[[], str]
) -> UsageError:
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
        f"{left_behind()}"
    )


def carry_out(job: Path, work: Callable[[Mapping[str, Any]], object]) -> int:
    """One process's part: do the job, tell what is wrong, and return the exit status."""
    given = json.loads(job.read_text())
    end_with_parent(given["starter"])
    try:
        work(given)
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
