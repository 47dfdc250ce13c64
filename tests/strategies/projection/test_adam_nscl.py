"""Adam-NSCL: the null space of all inputs, and steps inside it."""

import copy
import functools

import pytest
import torch
from dying import noisy
from family import matrices, moments_of, setting
from torch.optim import Adam
from toys import DIM, learn, make_learner, make_stream

from cl_bench.contracts import Protect
from cl_bench.strategies.projection.adam_nscl import AdamNSCL


def test_the_null_space_is_that_of_all_inputs_in_any_order():
    stream, learner = setting(tasks=2)
    nscl = AdamNSCL(a=50.0)
    learn(learner, nscl, stream[0], epochs=2)
    first = nscl.covariance["backbone.fc1"].clone()
    x = stream[0].everything["x"].double()
    torch.testing.assert_close(first, x.t() @ x / len(x), atol=1e-5, rtol=1e-5)
    learn(learner, nscl, stream[1], epochs=2)
    both = torch.cat([x, stream[1].everything["x"].double()])
    both = both[torch.randperm(len(both))]
    C = both.t() @ both / len(both)
    torch.testing.assert_close(nscl.covariance["backbone.fc1"], C, atol=1e-5, rtol=1e-5)
    assert nscl.seen["backbone.fc1"] == len(both)
    eigenvalues, V = torch.linalg.eigh(C)
    least = max(float(eigenvalues[0]), float(torch.finfo(torch.float32).eps * eigenvalues.sum()))
    U2 = V[:, eigenvalues <= 50 * least]
    M = nscl.occupied["backbone.fc1"]
    torch.testing.assert_close(M @ M.t() + U2 @ U2.t(), torch.eye(DIM).double(), atol=1e-4, rtol=0)
    assert 0 < U2.shape[1] < DIM


def test_samples_may_be_fewer():
    stream, learner = setting(tasks=1)
    nscl = AdamNSCL(samples=7)
    learn(learner, nscl, stream[0], epochs=1)
    assert nscl.seen["backbone.fc1"] == 7


def test_a_smallest_eigenvalue_below_rounding_is_clamped():
    nscl = AdamNSCL(a=10.0)
    rows = torch.diag(torch.tensor([1.0, 1e-3, 1e-5, 0.0]))
    nscl.consolidate(None, None, {"l": moments_of(rows)})
    M = nscl.occupied["l"]
    torch.testing.assert_close(M @ M.t(), torch.diag(torch.tensor([1.0, 0, 0, 0])).double())


@pytest.mark.parametrize("official", [False, True])
def test_the_step_is_projected_and_scaled_only_when_asked(official):
    stream, learner = setting(optimizer=functools.partial(Adam, lr=0.01))
    nscl = AdamNSCL(a=50.0, official_scale=official)
    learn(learner, nscl, stream[0], epochs=3)
    occupied = dict(nscl.occupied)
    learner.begin(stream[1], nscl)
    optimizer = learner.configure_optimizers()
    free = copy.deepcopy(learner)
    plain = Adam(free.parameters(), lr=0.01)
    batch = stream[1].sample(10, 0)
    before = matrices(learner)
    for network, opt in ((learner, optimizer), (free, plain)):
        opt.zero_grad()
        network.loss(network(batch), batch).backward()
        if network is learner:
            nscl.constrain(network)
        opt.step()
    for name, W in before.items():
        step, raw = matrices(learner)[name] - W, matrices(free)[name] - W
        M = occupied[name]
        d, k = M.shape
        P = torch.eye(d).double() - M @ M.t()
        expected = raw @ P / (float(P.norm()) if official else 1.0)
        assert float(P.norm()) == pytest.approx((d - k) ** 0.5, rel=1e-5)
        torch.testing.assert_close(step, expected, atol=1e-5, rtol=1e-3)
        assert float(step.norm()) > 1e-3
    nscl.release(learner)


def test_every_kind_of_parameter_has_its_rate():
    stream = make_stream("task")
    learner = make_learner(stream, noisy(), functools.partial(Adam, lr=0.1, weight_decay=0.5))
    nscl = AdamNSCL(
        later_rate=0.2, norm_rate=0.3, head_rate=0.4, protect=Protect(norm="free", bias="free")
    )
    for task, rates in ((stream[0], [0.1, 0.3, 0.4]), (stream[1], [0.2, 0.3, 0.4])):
        learner.begin(task, nscl)
        groups = learner.configure_optimizers().param_groups
        assert [g["lr"] for g in groups] == rates
        assert [g["weight_decay"] for g in groups] == [0.5, 0.5, 0.0]
        names = {id(p): n for n, p in learner.named_parameters()}
        assert {names[id(p)] for p in groups[2]["params"]} == {
            n for n in names.values() if n.startswith(f"heads.{task.index}.")
        }
        assert {names[id(p)] for p in groups[1]["params"]} == {
            "backbone.1.weight",
            "backbone.1.bias",
        }
        nscl.release(learner)
        learn(learner, nscl, task, epochs=1)
