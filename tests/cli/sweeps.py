"""Sweeps of two short tasks, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "+stream=permuted_digits",
    "stream.num_tasks=2",
    "trainer.max_epochs=1",
    "logger.mode=disabled",
    "alignment.enabled=false",
)
LONGER = ("-m", "+strategy=gpm", *TINY, "trainer.max_epochs=6", "checkpoint.every_steps=100")


def start(*arguments, cwd):
    return subprocess.Popen(
        [sys.executable, "-m", "cl_bench", *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def runs_of(directory):
    return sorted(p.parent for p in Path(directory).rglob("config.yaml"))
