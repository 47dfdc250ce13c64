"""Starting helpers in several processes, and comparing what they come to with one."""

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def start_together(directory, what, count=2):
    """Have ``count`` processes do a part of ``together.py``; returns what they left, by run."""
    return start_processes("together.py", directory, what, count=count)


def start_processes(script, directory, *words, count=2):
    """Have ``count`` processes run one of the helpers; returns what they left, by name."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "tests/helpers" / script), str(directory), *words],
        cwd=ROOT,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/helpers'}",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return lambda name: [
        torch.load(directory / f"{name}-rank{r}.pt", weights_only=True) for r in range(count)
    ]


def assert_equal_runs(found, wanted):
    """Weights to 1e-9, bases as projectors to 1e-8, predictions and scores as one process has."""
    first, *others = found
    for key, weight in first["weights"].items():
        assert all(torch.equal(weight, other["weights"][key]) for other in others)
        right = wanted["weights"][key].double()
        gap = (weight.double() - right).norm() / right.norm().clamp(min=1e-9)
        assert float(gap) < 1e-9, (key, float(gap))
    assert first["bases"].keys() == wanted["bases"].keys()
    for key, projector in first["bases"].items():
        assert all(torch.equal(projector, other["bases"][key]) for other in others)
        torch.testing.assert_close(projector, wanted["bases"][key], atol=1e-8, rtol=0)
    for mine, theirs in zip(first["predictions"], wanted["predictions"], strict=True):
        assert torch.equal(mine, theirs)
    close = {"atol": 1e-12, "rtol": 0, "equal_nan": True}
    torch.testing.assert_close(first["matrix"], wanted["matrix"], **close)
    assert first["steps"] == wanted["steps"]
