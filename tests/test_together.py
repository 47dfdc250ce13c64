"""Two processes that train together are one: weights, bases, predictions, scores."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from together import CASES, run
from torch import nn
from toys import make_stream

from cl_bench.contracts import UsageError
from cl_bench.experiment import check_together
from cl_bench.experiment.interrupts import Interrupts
from runs import differences, final_weights

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
    assert (alone["world"], first["world"], second["world"]) == (1, 2, 2)
    if name.startswith("rogo"):
        assert alone["relaxed"] > 0
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


# Replay draws anew with every micro-batch, and offers each to its memory.
ACCUMULATED = [name for name in CASES if "er" not in name.split("+") and name != "accumulated"]


@pytest.mark.parametrize("name", ACCUMULATED)
def test_four_small_batches_are_a_large_one(name, tmp_path):
    small = run(name, tmp_path / "small", samples=64, batch=8, accumulate_grad_batches=4)
    large = run(name, tmp_path / "large", samples=64, batch=32)
    assert small["steps"] == large["steps"] >= 2 * 5 * 2
    for key, weight in large["weights"].items():
        assert float((small["weights"][key] - weight).norm() / weight.norm()) < 1e-9, key
    for key, projector in large["bases"].items():
        torch.testing.assert_close(small["bases"][key], projector, atol=1e-8, rtol=0)


COMMAND = [
    *(sys.executable, "-m", "cl_bench", "+strategy=rogo", "+stream=permuted_digits"),
    *("trainer=ddp", "pack=1", "stream.num_tasks=2", "trainer.max_epochs=3", "batch_size=16"),
    *("checkpoint.every_steps=40", "strategy.cosine=0.5", "logger.mode=disabled"),
]


def start(*words):
    return subprocess.Popen(
        [*COMMAND[:3], *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole") / "run"
    process = start(*COMMAND[3:], f"run_dir={directory}")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return directory


def killed(directory, moment, number):
    """Start a run, and kill one of its processes when the record has ``moment`` lines."""
    process = start(*COMMAND[3:], f"run_dir={directory}")
    results = directory / "results.jsonl"
    while process.poll() is None:
        if results.exists() and len(results.read_bytes().splitlines()) >= moment:
            break
        time.sleep(0.02)
    time.sleep(random.Random(moment).random() / 2)
    found = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "together"], capture_output=True)
    workers = sorted(map(int, found.stdout.split()))
    assert workers, "the run was over before it could be killed"
    os.kill(workers[number % len(workers)], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


MOMENTS = [pytest.param(n, marks=[] if n == 5 else pytest.mark.slow) for n in range(1, 11)]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_whose_process_dies_ends_and_goes_on_to_the_same_bits(undisturbed, tmp_path, moment):
    directory = tmp_path / "run"
    ended = killed(directory, moment, number=moment)
    code, errors = ended
    assert code == 2, errors
    assert "signal SIGKILL" in errors
    assert "Traceback" not in errors
    process = start(f"resume={directory}")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert differences(undisturbed, directory) == []
    assert final_weights(undisturbed) == final_weights(directory)


def test_sigterm_reaches_every_process_and_the_run_goes_on_to_the_same_bits(undisturbed, tmp_path):
    directory = tmp_path / "run"
    process = start(*COMMAND[3:], f"run_dir={directory}")
    results = directory / "results.jsonl"
    while not results.exists() or len(results.read_bytes().splitlines()) < 4:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert f"resume={directory}" in errors
    assert "Traceback" not in errors
    process = start(f"resume={directory}")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert differences(undisturbed, directory) == []
    assert final_weights(undisturbed) == final_weights(directory)


def test_processes_that_hear_of_a_signal_answer_alike(monkeypatch):
    interrupts = Interrupts()
    monkeypatch.setattr("cl_bench.experiment.interrupts.gathered", lambda own: [0, own])

    def late(own):
        interrupts.requested = signal.SIGTERM  # while the others are asked
        return [0, own]

    assert not interrupts.agree()
    monkeypatch.setattr("cl_bench.experiment.interrupts.gathered", late)
    assert not interrupts.agree()
    assert interrupts.requested == signal.SIGTERM
    assert interrupts.agree()


def test_networks_that_look_at_the_whole_batch_are_refused():
    stream = make_stream()
    with pytest.raises(UsageError, match=r"layer '1' normalises over the batch"):
        check_together(stream, nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    check_together(stream, nn.Sequential(nn.Linear(3, 3), nn.GroupNorm(1, 3)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["+strategy=fot", "+federation=small", "trainer=ddp", "pack=1"],
            r"trainer\.devices=2: cl",
        ),
        (["trainer=ddp"], "packs of 64 batches: add pack=1"),
        (["trainer.devices=2", "pack=1"], "train together with trainer=ddp; add it"),
        (["trainer=ddp", "pack=1", "trainer.num_nodes=2"], "torchrun or SLURM"),
        (["trainer=ddp", "pack=1", "trainer.devices=0"], r"trainer\.devices=0"),
    ],
)
def test_what_cannot_run_together_is_refused_at_once(cli, words, message):
    strategy = [] if any("strategy=" in word for word in words) else ["+strategy=gpm"]
    status, _, errors = cli(*strategy, "+stream=permuted_digits", *words)
    assert status == 2
    assert re.search(message, errors)
