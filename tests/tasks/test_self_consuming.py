"""Generations that label themselves, and what becomes of them in closed form."""

import functools
import json
import math
import sys

import pytest
import torch
from dying import Killed, Mortal, sgd
from lightning import Trainer

from cl_bench.experiment import (
    AlignmentSettings,
    CheckpointSettings,
    EvalSettings,
    Identity,
    LoopSettings,
    conduct,
)
from cl_bench.metrics.collapse import (
    expected_error,
    iterated_regression,
    kept_error,
    shrinkage,
)
from cl_bench.models import MLP
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.tasks.self_consuming import SelfConsuming
from runs import differences

D, T, S, N, RUNS = 6, 60, 0.5, 8, 300
TRUTH = torch.ones(D, dtype=torch.float64)


@pytest.fixture(scope="module")
def regressions():
    return functools.cache(functools.partial(iterated_regression, TRUTH, N, T, S, runs=RUNS))


@pytest.mark.parametrize("n", [1, 4, 8])
def test_errors_of_iterated_least_squares_grow_as_the_closed_form_says(regressions, n):
    errors = (regressions()[:, n] - TRUTH).square().sum(1)
    deviation = float(errors.std()) / math.sqrt(RUNS)
    assert abs(float(errors.mean()) - expected_error(n, T, D, S)) < 4 * deviation


def test_ridge_shrinks_and_data_that_is_kept_bounds_the_error(regressions):
    shrunk = float(regressions(ridge=6.0)[:, N].mean())
    assert abs(shrunk - shrinkage(N, T, 6.0)) < 0.06
    errors = (regressions(keep=True)[:, N] - TRUTH).square().sum(1)
    assert abs(float(errors.mean()) / kept_error(N, T, D, S) - 1) < 0.2
    assert kept_error(1000, T, D, S) < math.pi**2 / 6 * S**2 * D / T < expected_error(N, T, D, S)


def test_without_noise_the_truth_stays():
    found = iterated_regression(TRUTH, N, T, 0.0)
    torch.testing.assert_close(found, TRUTH.expand(1, N + 1, D), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="needs more than 7"):
        expected_error(1, 7, D, S)


def one_hot(labels):
    return lambda batch: 50 * torch.nn.functional.one_hot(labels, 10).float()


def test_labels_are_the_models_and_kept_ones_stay_what_they_were():
    stream = SelfConsuming(num_tasks=3, keep=0.5)
    first, second, third = stream.generations
    assert first.prepare(one_hot(first.truth * 0)) is None
    assert torch.equal(first.y, first.truth)
    wrong = (second.truth + 1) % 10
    told = second.prepare(one_hot(wrong))
    assert torch.equal(second.y, wrong)
    assert told["right"] == 0
    told = third.prepare(one_hot(third.truth * 0))
    assert (told["entropy"], told["classes"]) == (0.0, 0.1)
    learned = third.train.tensors["y"]
    half = round(0.5 * len(second.y))
    assert torch.equal(learned[-half:], wrong[:half])
    assert torch.equal(learned[len(third.y) :][: len(first.y) // 2], first.y[: len(first.y) // 2])
    again = SelfConsuming(num_tasks=3, keep=0.5)
    again.load_state_dict(stream.state_dict())
    assert torch.equal(again[2].train.tensors["y"], learned)


def learn(directory, dies_at=-1, resume=False):
    stream = SelfConsuming(num_tasks=3, keep=0.2)
    torch.manual_seed(1)
    learner = Mortal(stream, MLP((1, 8, 8), (16,), False), sgd, 50, 0)
    learner.dies_at = dies_at
    trainer = functools.partial(
        Trainer, accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    return conduct(
        stream,
        Finetune(),
        learner,
        trainer,
        Identity("toy", "strategy", "seed: 0\n", "python -m cl_bench"),
        loop=LoopSettings(0, 50),
        evaluation=EvalSettings(),
        alignment=AlignmentSettings(enabled=False),
        checkpoint=CheckpointSettings(True, 4, 2),
        run_dir=directory,
        resume=resume,
    )


def test_killed_inside_a_generation_it_goes_on_with_the_same_labels(tmp_path, monkeypatch):
    module = sys.modules["cl_bench.experiment.conduct"]
    monkeypatch.setattr(module, "write_figures", lambda directory: [])
    monkeypatch.setattr(module, "print_run", lambda directory, console: None)
    learn(tmp_path / "whole")
    with pytest.raises(Killed):
        learn(tmp_path / "killed", dies_at=30)
    learn(tmp_path / "killed", resume=True)
    assert differences(tmp_path / "whole", tmp_path / "killed") == []
    lines = (tmp_path / "whole" / "results.jsonl").read_text().splitlines()
    told = [e for e in map(json.loads, lines) if e.get("probe") == "labels"]
    assert [e["task"] for e in told] == [1, 2]
    assert 0 < told[0]["values"]["right"] < 1
