"""Two processes that train together are one: weights, bases, predictions, scores."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from together import CASES, run

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What two processes came to, by case and rank."""
    directory = tmp_path_factory.mktemp("pair")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "tests/together.py"), str(directory)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        name: [torch.load(directory / f"{name}-rank{r}.pt", weights_only=True) for r in (0, 1)]
        for name in CASES
    }


@pytest.mark.parametrize("name", CASES)
def test_two_processes_come_to_what_one_does(pair, name, tmp_path):
    alone = run(name, tmp_path / "run")
    first, second = pair[name]
    for key, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][key])
        gap = (weight - alone["weights"][key]).norm() / alone["weights"][key].norm()
        assert float(gap) < 1e-9, (key, float(gap))
    for key, projector in first["bases"].items():
        assert torch.equal(projector, second["bases"][key])
        torch.testing.assert_close(projector, alone["bases"][key], atol=1e-8, rtol=0)
    for mine, theirs in zip(first["predictions"], alone["predictions"], strict=True):
        assert torch.equal(mine, theirs)
    torch.testing.assert_close(first["matrix"], alone["matrix"], atol=1e-12, rtol=0, equal_nan=True)
    assert first["steps"] == alone["steps"]
