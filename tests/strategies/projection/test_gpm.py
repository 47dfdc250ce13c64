"""GPM: the invariants of the method (orthogonality, energy, equivalences)."""

import functools
import types

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from benchmarks.naive_gpm import Activations, NaiveGPM
from gpms import NETWORKS, OPTIMIZERS, WIDE, consolidate, leaks, matrices, setting, sgd
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from toys import (
    DIM,
    IMAGE,
    accuracy,
    learn,
    learn_stream,
    make_engine,
    make_learner,
    make_stream,
    mlp,
    weights,
)

from cl_bench.contracts import Plan
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.projection.gpm import GPM

# -- 1, 2: the memory is orthonormal, and the weight change is orthogonal to it --------------------


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_change_inside_the_memory_and_the_new_task_is_learned(network, optimizer):
    stream, learner = setting(network, OPTIMIZERS[optimizer])
    gpm = GPM({"backbone.0": 0.6, "*": 0.9} if network == "cnn" else 0.9, samples=40)
    learn(learner, gpm, stream[0], epochs=10)
    for task in stream.tasks[1:]:
        before, memory = matrices(learner, gpm.protect), dict(gpm.memory)
        naive = accuracy(learner, task)
        learn(learner, gpm, task, epochs=10)
        for name, (leak, size) in leaks(learner, gpm, before, memory).items():
            assert 0 < memory[name].shape[1] < memory[name].shape[0], name
            assert size > 1e-3, name
            assert leak < 1e-4, name
        assert accuracy(learner, task) > naive + 0.2
    for name, M in gpm.memory.items():
        gap = M.t() @ M - torch.eye(M.shape[1], dtype=M.dtype)
        assert float(gap.abs().max()) < 1e-5, name


@pytest.mark.parametrize("optimizer", ["Adam", "AdamW", "RMSprop", "weight decay"])
def test_projecting_only_the_gradient_leaks(optimizer):
    stream, learner = setting("mlp", OPTIMIZERS[optimizer])
    gpm = GPM(0.8, samples=40)
    gpm.place = lambda learner: "gradient"  # which options refuse
    learn(learner, gpm, stream[0], epochs=10)
    before, memory = matrices(learner, gpm.protect), dict(gpm.memory)
    learn(learner, gpm, stream[1], epochs=10)
    assert max(leak for leak, _ in leaks(learner, gpm, before, memory).values()) > 1e-2


@pytest.mark.parametrize("optimizer", ["SGD", "weight decay", "Adam"])
@pytest.mark.parametrize(("pack", "clip"), [(1, None), (1, 0.1), (4, None)])
@pytest.mark.usefixtures("always_inputs")
def test_no_leak_under_the_engine(optimizer, pack, clip):
    stream = make_stream(tasks=2)
    learner = make_learner(stream, optimizer=OPTIMIZERS[optimizer], pack=pack)
    gpm = GPM(0.8, samples=40)
    options = {} if clip is None else {"gradient_clip_val": clip}
    engine = make_engine(learner, gpm, epochs=4, pack=pack, **options)
    engine.learn(stream[0], Plan(stream[0].train))
    before, memory = matrices(learner, gpm.protect), dict(gpm.memory)
    layers = engine.learn(stream[1], Plan(stream[1].train))
    for name, (leak, size) in leaks(learner, gpm, before, memory).items():
        assert size > 1e-3
        assert leak < 2e-4
        assert layers[name]["rank"] == gpm.memory[name].shape[1]
    assert all(type(m) in (nn.Linear, nn.ReLU, nn.Flatten) for m in learner.backbone)


# -- 3: what the network does to old inputs stays --------------------------------------------------


def test_a_layer_answers_old_inputs_as_before_and_others_not():
    stream = make_stream(tasks=2, n=4, subspace=4)
    learner = make_learner(stream, nn.Flatten())
    gpm = GPM(1.0, rank_rule="energy")
    learn(learner, gpm, stream[0])
    old = stream[0].everything["x"]
    other = torch.randn(5, DIM)
    head = learner.heads[0]
    before = head(old).detach(), head(other).detach()
    learn(learner, gpm, stream[1])
    torch.testing.assert_close(head(old), before[0], atol=1e-5, rtol=1e-5)
    assert float((head(other) - before[1]).detach().norm()) > 0.1


def striding_cnn():
    """Few patches a layer: four images leave dimensions free."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(2, 8, 3, stride=3), nn.ReLU(), nn.Conv2d(8, 16, 2), nn.ReLU())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("network", ["mlp", "mlp with biases", "cnn"])
def test_with_threshold_1_the_whole_net_answers_old_inputs_as_before(network, optimizer):
    make, shape = {
        "mlp": (mlp, (DIM,)),
        "mlp with biases": (functools.partial(mlp, bias=True), (DIM,)),
        "cnn": (striding_cnn, IMAGE),
    }[network]
    stream = make_stream(tasks=2, n=4, shape=shape, subspace=3)
    learner = make_learner(stream, make(), OPTIMIZERS[optimizer], batch_size=4, head_bias=True)
    gpm = GPM(1.0, rank_rule="energy")
    learn(learner, gpm, stream[0], epochs=5, batch_size=4)
    old = stream[0].everything
    learner.eval()
    before, weights_before = learner(old).detach(), matrices(learner, gpm.protect)
    memory, new = dict(gpm.memory), stream[1].everything
    naive = float(learner.loss(learner(new), new).detach())
    learn(learner, gpm, stream[1], epochs=40, batch_size=4)
    learner.eval()
    torch.testing.assert_close(learner(old).detach(), before, atol=1e-4, rtol=1e-4)
    for _, size in leaks(learner, gpm, weights_before, memory).values():
        assert size > 1e-3
    assert float(learner.loss(learner(new), new).detach()) < naive - 0.1


# -- 4, 5: energy, minimality, monotone growth -----------------------------------------------------


@st.composite
def two_tasks(draw):
    d = draw(st.integers(2, 10))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    scale = 0.6 ** torch.arange(d, dtype=torch.float64)
    made = []
    for _ in range(2):
        n = draw(st.integers(1, 15))
        rotation = torch.linalg.qr(torch.randn(d, d, generator=rng, dtype=torch.float64))[0]
        normal = torch.randn(d, n, generator=rng, dtype=torch.float64)
        made.append(rotation @ (scale[:, None] * normal))
    return made


def share(M, R):
    return float((M.t() @ R).square().sum() / R.square().sum())


@settings(max_examples=60)
@given(two_tasks(), st.floats(0.05, 0.999), st.sampled_from(["official", "energy"]))
def test_energy_criterion_minimality_and_growth(inputs, eps, rule):
    first, second = inputs
    gpm = GPM(eps, rank_rule=rule)
    M1 = consolidate(gpm, first)
    shares = torch.linalg.svdvals(first).square().cumsum(0) / first.square().sum()
    assume(float((shares - eps).abs().min()) > 1e-9)
    if rule == "official":
        assert share(M1, first) < eps
        assert M1.shape[1] == int((shares < eps).sum())
    else:
        assert share(M1, first) >= eps - 1e-9
        assert share(M1[:, :-1], first) < eps
    M2 = consolidate(gpm, second, index=1)
    k = M1.shape[1]
    assert torch.equal(M2[:, :k], M1)
    assert M2.shape[1] <= len(first)
    assert share(M2, second) >= eps - 1e-9
    if M2.shape[1] > k:
        assert share(M2[:, :-1], second) < eps
    gap = M2.t() @ M2 - torch.eye(M2.shape[1], dtype=M2.dtype)
    assert float(gap.abs().max()) < 1e-8
    assume(share(M2, second) - eps > 1e-9)
    assert torch.equal(consolidate(gpm, second, index=1), M2)


@settings(max_examples=30)
@given(two_tasks(), st.floats(0.05, 0.99))
def test_ranks_are_those_of_the_published_script(inputs, eps):
    gpm, naive = GPM(eps), NaiveGPM([eps])
    for index, R in enumerate(inputs):
        M = consolidate(gpm, R, index)
        stats = {"l": Activations(R.numpy())}
        naive.consolidate(None, types.SimpleNamespace(index=index), stats)
        theirs = torch.from_numpy(naive.memory["l"])
        assume(abs(share(theirs, R) - eps) > 1e-9)
        assert M.shape == theirs.shape
        torch.testing.assert_close(M @ M.t(), theirs @ theirs.t(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("rule", ["official", "energy"])
def test_threshold_1_fills_the_span_and_no_more(rule):
    R = torch.randn(8, 3, dtype=torch.float64) @ torch.randn(3, 20, dtype=torch.float64)
    gpm = GPM(1.0, rank_rule=rule)
    consolidate(gpm, R)
    M = consolidate(gpm, R, index=1)
    assert M.shape == (8, 3)
    torch.testing.assert_close(M @ (M.t() @ R), R)
    everything = consolidate(gpm, torch.randn(8, 30, dtype=torch.float64), index=2)
    assert everything.shape == (8, 8)
    assert torch.equal(consolidate(gpm, torch.randn(8, 30, dtype=torch.float64)), everything)


# -- 6, 7, 8: limits and equivalences --------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("project", ["auto", "input", "gradient", "step"])
@pytest.mark.usefixtures("always_inputs")
def test_without_memory_gpm_is_plain_sgd_bit_for_bit(network, project):
    stream, free = setting(network, tasks=2)
    learn_stream(free, Finetune(), stream)
    _, learner = setting(network, tasks=2)
    gpm = GPM(1e-9, project=project)  # the first direction already crosses it: rank 0
    learn_stream(learner, gpm, stream[:1])
    assert gpm.memory
    assert all(M.shape[1] == 0 for M in gpm.memory.values())
    learn(learner, gpm, stream[1])
    for name, weight in weights(free).items():
        assert torch.equal(weight, weights(learner)[name]), name


@pytest.mark.parametrize("optimizer", ["SGD", "momentum", "Adam", "weight decay"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.usefixtures("always_inputs")
def test_a_full_memory_allows_no_update(network, optimizer):
    stream, learner = setting(network, OPTIMIZERS[optimizer], tasks=2)
    gpm = GPM()
    learn(learner, gpm, stream[0])
    gpm.memory = {n: torch.eye(len(M), dtype=M.dtype) for n, M in gpm.memory.items()}
    before = weights(learner)
    learn(learner, gpm, stream[1])
    for name, weight in weights(learner).items():
        assert torch.equal(weight, before[name]), name


def trained(network, gpm, optimizer=sgd, **options):
    stream, learner = setting(network, optimizer, **options)
    learn_stream(learner, gpm, stream)
    return weights(learner), gpm


@pytest.mark.parametrize("threshold", [0.6, 0.97])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.usefixtures("always_inputs")
def test_input_gradient_and_step_side_learn_the_same(network, threshold):
    found = {
        where: trained(network, GPM(threshold, samples=40, project=where))
        for where in ("gradient", "input", "step", "auto")
    }
    expected, gpm = found["gradient"]
    for other, strategy in found.values():
        for name, weight in expected.items():
            torch.testing.assert_close(other[name], weight, atol=1e-5, rtol=1e-4)
        assert strategy.metrics() == gpm.metrics()


def test_the_published_script_learns_the_same():
    ours, gpm = trained("mlp", GPM([0.9, 0.95, 0.95], samples=40))
    theirs, naive = trained("mlp", NaiveGPM([0.9, 0.95, 0.95], samples=40))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-5, rtol=1e-4)
    for name, M in gpm.memory.items():
        assert M.shape == naive.memory[name].shape


def test_a_1x1_convolution_on_one_pixel_is_a_linear_layer():
    class Pixel(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return F.relu(self.layer(x[:, :, None, None])[:, :, 0, 0])

    class Plain(Pixel):
        def forward(self, x):
            return F.relu(self.layer(x))

    linear, conv = nn.Linear(DIM, WIDE), nn.Conv2d(DIM, WIDE, 1)
    with torch.no_grad():
        conv.weight.copy_(linear.weight[:, :, None, None])
        conv.bias.copy_(linear.bias)
    stream = make_stream()
    found = []
    for model in (Plain(linear), Pixel(conv)):
        learner, gpm = make_learner(stream, model), GPM(0.9, samples=40)
        learn_stream(learner, gpm, stream)
        found.append((matrices(learner, gpm.protect), gpm.memory))
    for name in found[0][0]:
        torch.testing.assert_close(found[0][0][name], found[1][0][name], atol=1e-5, rtol=1e-5)
        one, other = (memory[name] @ memory[name].t() for _, memory in found)
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
