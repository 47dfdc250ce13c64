"""MAS: the sensitivity of the outputs, by hand."""

import pytest
import torch
from torch import nn
from toys import learn, make_learner, make_stream, weights

from cl_bench.strategies.penalty.mas import MAS


def linear_net(scenario="domain", **options):
    """A network that is one matrix W = head body, with a stream in double precision."""
    stream = make_stream(scenario, tasks=2)
    for task in stream:
        task.data.tensors["x"] = task.data.tensors["x"].double()
    torch.manual_seed(3)
    body = nn.Sequential(nn.Flatten(), nn.Linear(12, 4, bias=False))
    learner = make_learner(stream, body).double()
    strategy = MAS(samples=1000, **options)
    learn(learner, strategy, stream[0], epochs=1)
    return stream, learner, strategy


@pytest.mark.parametrize("scenario", ["domain", "task", "class"])
def test_importance_of_a_linear_net_is_what_one_finds_by_hand(scenario):
    """f = V W x has d||f||^2/dV = 2 f h^T and d||f||^2/dW = 2 V^T f x^T, with h = W x."""
    stream, learner, strategy = linear_net(scenario)
    W, V = learner.backbone[1].weight.detach(), learner.heads[0].weight.detach()
    x = stream[0].everything["x"]
    h = x @ W.t()
    f = h @ V.t()
    head = (2 * f[:, :, None] * h[:, None, :]).abs().mean(0)
    body = (2 * (f @ V)[:, :, None] * x[:, None, :]).abs().mean(0)
    found = strategy.importance
    torch.testing.assert_close(found["heads.0.weight"], head, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(found["backbone.1.weight"], body, atol=1e-12, rtol=1e-10)


def test_of_batches_it_is_the_absolute_mean_and_never_more():
    _, _, single = linear_net()
    stream, learner, batched = linear_net(mean_of=10)
    name = "heads.0.weight"
    x = stream[0].everything["x"]
    h = x @ learner.backbone[1].weight.detach().t()
    f = h @ learner.heads[0].weight.detach().t()
    rows = 2 * f[:, :, None] * h[:, None, :]
    order = stream[0].sample(1000, 0)["x"]
    where = (order[:, None] == x[None]).all(2).double().argmax(1)
    by_batch = torch.stack([rows[w].mean(0).abs() for w in where.split(10)]).mean(0)
    torch.testing.assert_close(batched.importance[name], by_batch, atol=1e-12, rtol=1e-10)
    assert (batched.importance[name] <= single.importance[name] + 1e-12).all()
    assert not torch.allclose(batched.importance[name], single.importance[name])  # the control


def test_labels_have_no_part_in_it_and_tasks_add_up():
    stream, learner, strategy = linear_net()
    batch = strategy.collect(learner, stream[0])
    stream[0].data.tensors["y"] = stream[0].data.tensors["y"].flip(0)
    other = strategy.collect(learner, stream[0])
    assert all(torch.equal(batch[k], other[k]) for k in batch)
    before = {n: v.clone() for n, v in strategy.importance.items()}
    learn(learner, strategy, stream[1], epochs=1)
    found = strategy.collect(learner, stream[1])
    for name, omega in strategy.importance.items():
        torch.testing.assert_close(omega, before[name] + found[name] / found["samples"])
        assert torch.equal(strategy.centre[name], weights(learner)[name])


def test_the_penalty_is_its_formula():
    stream, learner, strategy = linear_net(strength=0.3)
    learner.begin(stream[1], strategy)
    assert strategy.penalty(learner, {}, torch.empty(0)) == 0
    with torch.no_grad():
        learner.heads[0].weight += 0.1
    value = strategy.penalty(learner, {}, torch.empty(0))
    wanted = 0.3 * 0.01 * strategy.importance["heads.0.weight"].sum()
    torch.testing.assert_close(value, wanted)
