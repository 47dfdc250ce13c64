"""Prequential scores, recomputed by hand from single answers."""

import math

import torch

from cl_bench.metrics.prequential import Prequential, recoveries, windowed


def test_every_score_follows_from_the_bits():
    bits = (torch.rand(300, generator=torch.Generator().manual_seed(0)) < 0.7).double()
    labels = torch.arange(300) // 3 % 2
    whole, pieces = Prequential(50, 0.9), Prequential(50, 0.9)
    whole.add(bits, labels)
    for at in range(0, 300, 7):
        pieces.add(bits[at : at + 7], labels[at : at + 7])
    assert pieces.values() == whole.values()
    values = whole.values()
    assert torch.equal(whole.bits.double(), bits)
    assert values["accuracy"] == bits.mean()
    assert math.isclose(values["window"], bits[-50:].mean())
    weights = 0.9 ** torch.arange(299, -1, -1).double()
    assert math.isclose(values["faded"], float((weights * bits).sum() / weights.sum()))
    same = float((labels[1:] == labels[:-1]).sum()) / 300
    assert math.isclose(values["kappa"], (float(bits.mean()) - same) / (1 - same))
    again = Prequential(50, 0.9)
    again.load_state_dict(whole.state_dict())
    again.add(bits[:5], labels[:5])
    whole.add(bits[:5], labels[:5])
    assert again.values() == whole.values()


def test_windows_at_the_beginning_hold_what_there_is():
    assert windowed(torch.tensor([1, 0, 1, 1]), 2).tolist() == [1, 0.5, 0.5, 1]


def test_recovery_counts_samples_until_a_window_behind_the_drift_is_back():
    bits = torch.cat([torch.ones(20), torch.zeros(6), torch.ones(20)])
    assert recoveries(bits, [20], 5) == [11]
    never = torch.cat([torch.ones(20), torch.zeros(20)])
    assert math.isnan(recoveries(never, [20], 5)[0])
    assert math.isnan(recoveries(bits, [3], 5)[0])  # no window was full before
