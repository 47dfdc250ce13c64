"""Retrieval scores on a few points, and what rotations do to them."""

import math

import pytest
import torch

from cl_bench.metrics.retrieval import cmc1, compatibility, mean_average_precision, ranked

LABELS = torch.tensor([0, 0, 1, 1])


def at(*degrees):
    angles = torch.tensor(degrees).double().deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1)


def test_scores_by_hand():
    # Nearest first: of 0 deg: 10 (right), 30, 100; of 10: 0 (right); of 30: 10 (wrong), 0, 100;
    # of 100: 30 (right).
    hits = ranked(at(0, 10, 30, 100), at(0, 10, 30, 100), LABELS)
    assert hits.tolist() == [
        [True, False, False],
        [True, False, False],
        [False, False, True],
        [True, False, False],
    ]
    assert cmc1(hits) == 0.75
    assert mean_average_precision(hits) == pytest.approx((1 + 1 + 1 / 3 + 1) / 4)
    assert math.isnan(mean_average_precision(torch.zeros(2, 1, dtype=torch.bool)))


def test_a_rotation_of_one_model_leaves_itself_and_breaks_the_pair():
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 4
    old = 3 * torch.randn(4, 8, generator=rng)[labels] + torch.randn(40, 8, generator=rng)
    Q = torch.linalg.qr(torch.randn(8, 8, generator=rng))[0]
    new = old @ Q
    same = cmc1(ranked(old, old, labels))
    assert cmc1(ranked(new, new, labels)) == same > 0.9
    assert cmc1(ranked(new, old, labels)) < 0.6
    longer = torch.cat([old, torch.randn(40, 3, generator=rng)], 1)
    assert cmc1(ranked(longer, old, labels)) == same


def test_compatibility_by_hand():
    found = compatibility([[0.5], [0.6, 0.8], [0.4, 0.9, 1.0]])
    assert found["compatible"] == pytest.approx(2 / 3)
    assert found["multi_model"] == pytest.approx(4.2 / 6)
    assert found["self"] == pytest.approx(2.3 / 3)
    assert found["backward"] == pytest.approx((0.1 - 0.1 + 0.1) / 3)
    assert math.isnan(compatibility([[0.5]])["compatible"])
