"""Streams of river's, cut into tasks."""

import sys

import pytest
import torch

from cl_bench.contracts import UsageError
from cl_bench.tasks.drift import Drift

FEW = {"train_samples": 300, "test_samples": 30}


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "river", None)
    with pytest.raises(UsageError, match="river"):
        Drift()


@pytest.mark.parametrize("data", ["sea", "sine", "hyperplane", "rbf", "phishing", "bananas"])
def test_streams_are_the_same_again_and_in_order(data):
    pytest.importorskip("river")
    made, again = Drift(data, 2, **FEW), Drift(data, 2, **FEW)
    assert made.fingerprint == again.fingerprint
    task = made[0]
    assert task.ordered
    batch = task.train[torch.arange(5)]
    assert torch.equal(batch["x"], again[0].train[torch.arange(5)]["x"])
    assert batch["y"].max() < len(task.classes)
    if data not in ("phishing", "bananas"):
        assert (len(task.train), len(task.test)) == (300, 30)
        assert Drift(data, 2, seed=1, **FEW).fingerprint != made.fingerprint


def test_a_concept_gives_way_at_once_or_bit_by_bit():
    """Sine's second concept is the first one's with labels swapped."""
    pytest.importorskip("river")

    def swapped(width):
        batch = Drift("sine", 2, width=width, **FEW)[1].train[torch.arange(300)]
        return ((batch["x"][:, 0] >= batch["x"][:, 1].sin()).long() != batch["y"]).float()

    at_once, slowly = swapped(0), swapped(300)
    assert at_once.unique().numel() == 1
    early, late = slowly[:75].mean(), slowly[-75:].mean()
    assert abs(float(early - late)) > 0.5
