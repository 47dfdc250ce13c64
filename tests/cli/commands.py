"""The command line in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "HYDRA_FULL_ERROR": "0",
}
SHORT = ("stream.num_tasks=2", "trainer.max_epochs=1", "logger.mode=disabled")
PLAIN = ("+strategy=gpm", "+stream=permuted_digits", *SHORT)


def start(*arguments, cwd, **environment):
    """``python -m cl_bench`` as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "cl_bench", *arguments],
        cwd=cwd,
        env={**ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err


def summary(directory):
    return json.loads((directory / "summary.json").read_text())
