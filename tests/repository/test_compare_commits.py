"""The comparison of two commits' runs sees what differs, and takes only declared reasons."""

import functools
import sys

import compare_commits
import pytest
from compare_commits import cases, compare, reason
from dying import learn
from torch.optim import SGD

from cl_bench.strategies.projection.gpm import GPM

gpm = functools.partial(GPM, 0.9, samples=20)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    module = sys.modules["cl_bench.experiment.conduct"]
    monkeypatch.setattr(module, "write_figures", lambda directory: [])
    for name, rate in (("one", 0.05), ("same", 0.05), ("other", 0.0501)):
        learn(tmp_path / name, gpm, optimizer=functools.partial(SGD, lr=rate), epochs=1)
    return tmp_path


def test_two_runs_of_one_thing_are_identical_and_others_are_not(runs):
    assert compare(runs / "one", runs / "same") == []
    found = compare(runs / "one", runs / "other")
    for part in ("task0003 weights: ", "state: strategy/", "state: weights/", "event epoch: "):
        assert any(name.startswith(part) for name in found), (part, found)
    assert not any("seconds" in name or "time" in name for name in found)


def test_only_what_was_declared_has_a_reason():
    entries = [{"runs": "gpm *", "results": ["event epoch: train_loss *"], "reason": "a mean"}]
    assert reason("gpm split_digits", "event epoch: train_loss (no. 1)", entries) == "a mean"
    assert reason("gpm split_digits", "matrix", entries) is None
    assert reason("er split_digits", "event epoch: train_loss (no. 1)", entries) is None


def test_a_declaration_counts_between_the_two_commits_alone(monkeypatch, tmp_path):
    path = tmp_path / "declared.yaml"
    path.write_text("- {commit: '2', runs: '*', results: ['*'], reason: r}\n")
    monkeypatch.setattr(compare_commits, "is_ancestor", lambda one, other: int(one) <= int(other))
    assert len(compare_commits.declared("1", "2", path)) == 1
    assert compare_commits.declared("2", "3", path) == []
    assert compare_commits.declared("0", "1", path) == []


def test_every_strategy_and_both_engines_are_in_the_list(tmp_path):
    found = cases(tmp_path)
    strategies = {path.stem for path in (compare_commits.ROOT / "conf/strategy").glob("*.yaml")}
    assert {name.split()[0] for name in found} == strategies
    assert {"er permuted_digits", "er permuted_digits federated"} <= set(found)
    assert "gpm permuted_digits federated" not in found
    assert "fot permuted_digits" not in found
