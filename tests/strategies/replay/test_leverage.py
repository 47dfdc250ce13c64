"""A memory by leverage: scores of the hat matrix, weights of a reservoir."""

import pytest
import torch
from toys import learn_stream, make_learner, make_stream

from cl_bench.strategies.replay.leverage_er import LeverageER
from cl_bench.subspace import SparseGP


def points(n=30, d=3, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).double()


def test_scores_are_the_diagonal_of_the_hat_matrix_where_all_points_induce():
    x, noise = points(), 0.3
    process = SparseGP(30, length=1.0)
    for part in x.split(10):
        process.learn(part, torch.full((10,), 1 / noise**2).double())
    K = torch.exp(-torch.cdist(x, x).square() / 2)
    hat = K @ torch.linalg.inv(K + noise**2 * torch.eye(30).double())
    torch.testing.assert_close(process.variance(x) / noise**2, hat.diagonal(), atol=1e-3, rtol=0)


def test_a_duplicate_shares_its_leverage():
    """h becomes h / (1 + h) each."""
    x = points(1)
    once, twice = SparseGP(5, 1.0), SparseGP(5, 1.0)
    once.learn(x, torch.ones(1))
    twice.learn(torch.cat([x, x]), torch.ones(2))
    h = float(once.variance(x))
    assert float(twice.variance(x)) == pytest.approx(h / (1 + h), abs=1e-5)


def test_inducing_points_are_bounded():
    process = SparseGP(7)
    for seed in range(4):
        process.learn(points(20, seed=seed), torch.ones(20))
    assert len(process.points) == 7


def kept(weights, runs=1000, memory=2):
    counts = torch.zeros(len(weights))
    for seed in range(runs):
        strategy = LeverageER(memory=memory)
        strategy.begin(seed)
        strategy.weigh({"x": torch.arange(len(weights))}, torch.tensor(weights).double())
        assert strategy.filled == memory
        counts[strategy.buffer["x"]] += 1
    return counts / runs


def test_equal_weights_keep_uniformly_and_others_by_weight():
    assert float((kept([1.0] * 5) - 2 / 5).abs().max()) < 0.07
    # Of one slot, the chance of each is its share of the weight.
    found = kept([1.0, 2.0, 5.0], memory=1)
    torch.testing.assert_close(found, torch.tensor([1.0, 2, 5]) / 8, atol=0.07, rtol=0)


def test_it_learns_with_a_full_memory_and_the_same_again():
    states = []
    for _ in range(2):
        stream = make_stream(tasks=2)
        strategy = LeverageER(memory=15, inducing=10)
        learn_stream(make_learner(stream), strategy, stream, epochs=2)
        assert strategy.exemplars == 15
        states.append(strategy.state_dict())
    assert torch.equal(states[0]["keys"], states[1]["keys"])
    assert torch.equal(states[0]["buffer"]["x"], states[1]["buffer"]["x"])
