"""One of the processes that :func:`cl_bench.cli.together.start` starts: the run they share."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from cl_bench.cli.output import patient_output
from cl_bench.cli.run import run_config
from cl_bench.cli.signals import stopping
from cl_bench.cli.threads import computing_with
from cl_bench.parallel.launch import carry_out


def run(job: Mapping[str, Any]) -> None:
    """Run the experiment that the job describes."""
    with patient_output(), stopping(), computing_with(job["threads"]):
        run_config(
            OmegaConf.create(job["config"]),
            job["command"],
            job["choices"],
            job["resume"],
            notes=job["notes"],
        )


if __name__ == "__main__":
    sys.exit(carry_out(Path(sys.argv[1]), run))
