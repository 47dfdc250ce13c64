"""Two processes that train together are one: weights, bases, predictions, scores."""

import functools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from ports import is_loopback, listening
from several import ROOT, assert_equal_runs, start_together
from together import CASES, SEEDS, SHARDABLE, SINGLE, run, single
from torch import nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from cl_bench.contracts import UsageError
from cl_bench.experiment import CheckpointSettings, check_together
from cl_bench.experiment.checkpoint import Checkpoints, read_checkpoint
from cl_bench.experiment.interrupts import Interrupts
from cl_bench.parallel.rendezvous import OneMachine, alone_together
from runs import differences, final_weights


def learned_by_two(directory, precision):
    """What two processes came to, by case, trainer and rank."""
    found = start_together(directory, precision)
    return lambda name, kind: found(f"{name}-{kind}" if kind else name)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return learned_by_two(tmp_path_factory.mktemp("pair"), "double")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process comes to, by case."""
    return functools.cache(lambda name: run(name, tmp_path_factory.mktemp("alone") / name))


@pytest.mark.parametrize(
    ("name", "kind"), [*((n, "ddp") for n in CASES), *((n, "fsdp") for n in SHARDABLE)]
)
def test_two_processes_come_to_what_one_does(pair, alone, name, kind):
    wanted, (first, second) = alone(name), pair(name, kind)
    assert (wanted["world"], first["world"], second["world"]) == (1, 2, 2)
    if name.startswith("rogo"):
        assert wanted["relaxed"] > 0
    assert_equal_runs((first, second), wanted)


def test_a_run_that_dies_inside_a_task_goes_on_to_the_same_bits(pair):
    for mine, whole in zip(pair("cut", None), pair("adaptive_svd", "fsdp"), strict=True):
        for key, weight in whole["weights"].items():
            assert torch.equal(mine["weights"][key], weight), key


@pytest.fixture(scope="module")
def single_pair(tmp_path_factory):
    return learned_by_two(tmp_path_factory.mktemp("single"), "single")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", SINGLE)
def test_in_single_precision_means_are_within_seed_noise(single_pair, tmp_path, name, kind):
    def scores(matrix):
        return [float(matrix[-1].mean()), float(matrix[-1, 0] - matrix[1, 0])]  # ACC, BWT

    one = [run(name, tmp_path / f"{s}", **single(s))["matrix"] for s in SEEDS]
    two = [single_pair(f"{name}{s}", kind)[0]["matrix"] for s in SEEDS]
    one, two = (torch.tensor([scores(m) for m in found]) for found in (one, two))
    gap, noise = (one.mean(0) - two.mean(0)).abs(), one.std(0)
    assert bool((noise > 0).all())
    assert bool((gap <= noise).all()), (gap, noise)


def test_what_shares_its_weights_out_holds_a_part(pair):
    whole, half = (pair("gpm", kind)[0]["held"] for kind in ("ddp", "fsdp"))
    assert half < 0.6 * whole


ACCUMULATED = [
    name
    for name, (_, _, options) in CASES.items()
    if not {"family", "batch_norm", "accumulate_grad_batches"} & set(options)
]


@pytest.mark.parametrize("name", ACCUMULATED)
def test_four_small_batches_are_a_large_one(name, tmp_path):
    small = run(name, tmp_path / "small", samples=64, batch=8, accumulate_grad_batches=4)
    large = run(name, tmp_path / "large", samples=64, batch=32)
    assert small["steps"] == large["steps"] >= 2 * 5 * 2
    for key, weight in large["weights"].items():
        gap = (small["weights"][key] - weight).norm() / weight.norm().clamp(min=1e-9)
        assert float(gap) < 1e-9, key
    for key, projector in large["bases"].items():
        torch.testing.assert_close(small["bases"][key], projector, atol=1e-8, rtol=0)


COMMON = [
    *("+stream=permuted_digits", "stream.num_tasks=2", "trainer.max_epochs=3", "batch_size=16"),
    *("pack=1", "checkpoint.every_steps=40", "logger.mode=disabled"),
]
COMMANDS = {
    "ddp": ["+strategy=rogo", "strategy.cosine=0.5", "trainer=ddp", *COMMON],
    "fsdp": ["+strategy=rogo", "strategy.cosine=0.5", "trainer=fsdp", "optimizer=adam", *COMMON],
    "fsdp-adaptive_svd": ["+strategy=adaptive_svd", "trainer=fsdp", "optimizer=adam", *COMMON],
    "fsdp-task_vector": ["+strategy=task_vector", "strategy.epoch=2", "trainer=fsdp", *COMMON],
}


def start(*words):
    return subprocess.Popen(
        [sys.executable, "-m", "cl_bench", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    @functools.cache
    def learned(kind):
        directory = tmp_path_factory.mktemp("whole") / "run"
        process = start(*COMMANDS[kind], f"run_dir={directory}")
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        return directory

    return learned


def killed(kind, directory, moment, number):
    """Start a run, and kill one of its processes when the record has ``moment`` lines."""
    process = start(*COMMANDS[kind], f"run_dir={directory}")
    results = directory / "results.jsonl"
    while process.poll() is None:
        if results.exists() and len(results.read_bytes().splitlines()) >= moment:
            break
        time.sleep(0.02)
    time.sleep(random.Random(moment).random() / 2)
    found = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "cli.worker"], capture_output=True
    )
    workers = sorted(map(int, found.stdout.split()))
    assert workers, "the run was over before it could be killed"
    os.kill(workers[number % len(workers)], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


MOMENTS = [
    pytest.param(kind, n, marks=[] if (kind, n) == ("ddp", 5) else pytest.mark.slow)
    for kind, moments in (
        ("ddp", range(1, 11)),
        ("fsdp", (3, 5, 7)),
        ("fsdp-adaptive_svd", range(1, 11)),
        ("fsdp-task_vector", (6,)),
    )
    for n in moments
]


@pytest.mark.parametrize(("kind", "moment"), MOMENTS)
def test_a_run_whose_process_dies_ends_and_goes_on_to_the_same_bits(
    undisturbed, tmp_path, kind, moment
):
    directory = tmp_path / "run"
    ended = killed(kind, directory, moment, number=moment)
    code, errors = ended
    assert code == 2, errors
    assert "signal SIGKILL" in errors
    assert "Traceback" not in errors
    process = start(f"resume={directory}")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert differences(undisturbed(kind), directory) == []
    assert final_weights(undisturbed(kind)) == final_weights(directory)


@pytest.mark.slow
def test_a_run_goes_on_in_another_number_of_processes(undisturbed, tmp_path):
    directory = tmp_path / "run"
    killed("fsdp-adaptive_svd", directory, 6, number=1)
    process = start(f"resume={directory}", "trainer.devices=3")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    whole, ours = (last_weights(d) for d in (undisturbed("fsdp-adaptive_svd"), directory))
    for name, weight in whole.items():
        assert float((ours[name] - weight).norm() / weight.norm().clamp(min=1e-9)) < 1e-3, name


def last_weights(directory):
    paths = Checkpoints(directory, CheckpointSettings()).paths()
    return read_checkpoint(paths[-1])["start"]["weights"]


def test_sigterm_reaches_every_process_and_the_run_goes_on_to_the_same_bits(undisturbed, tmp_path):
    directory = tmp_path / "run"
    process = start(*COMMANDS["ddp"], f"run_dir={directory}")
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
    assert differences(undisturbed("ddp"), directory) == []
    assert final_weights(undisturbed("ddp")) == final_weights(directory)


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
    norm = nn.BatchNorm1d(3, track_running_stats=False)
    with pytest.raises(UsageError, match=r"layer '1' normalises test data by the batch"):
        check_together(nn.Sequential(nn.Linear(3, 3), norm))
    check_together(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["+strategy=fot", "+federation=small", "trainer=ddp", "pack=1"],
            r"trainer\.devices=2: cl",
        ),
        (["trainer=ddp"], "packs of 64 batches: add pack=1"),
        (["trainer.devices=2", "pack=1"], "train together with trainer=ddp or.* add one"),
        (["trainer=fsdp", "pack=1", "trainer.devices=1"], "nobody to share weights out with"),
        (
            ["trainer=fsdp", "pack=1", "+strategy=si"],
            r"\(SI, with .*needs whole ones",
        ),
        (["trainer=ddp", "pack=1", "trainer.num_nodes=2"], "torchrun or SLURM"),
        (["trainer=ddp", "pack=1", "trainer.devices=0"], r"trainer\.devices=0"),
    ],
)
def test_what_cannot_run_together_is_refused_at_once(cli, words, message):
    strategy = [] if any("strategy=" in word for word in words) else ["+strategy=gpm"]
    status, _, errors = cli(*strategy, "+stream=permuted_digits", *words)
    assert status == 2
    assert re.search(message, errors)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_processes_of_one_machine_listen_on_loopback_alone(tmp_path):
    before, listened = dict(os.environ), listening(os.getpid())  # for tests before this one
    settings = LaunchConfig(1, 1, 2, run_id="ports", rdzv_backend=OneMachine.get_backend())
    with alone_together(tmp_path):
        # The store is a file that only this user can reach; no port of it is open anywhere.
        elastic_launch(settings, sys.executable)(
            "-P", str(ROOT / "tests/helpers/ports.py"), str(tmp_path)
        )
    assert {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC")} == before
    for rank in range(2):
        said = json.loads((tmp_path / f"{rank}.json").read_text())
        assert said["sum"] == 3
        assert said["own"], "gloo listens somewhere, or this test sees nothing"
        assert all(map(is_loopback, said["own"])), said
        assert said["launcher"] == listened
