"""EWC: Fisher information, the penalty and its pull, by hand where possible."""

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from states import assert_goes_on_the_same, penalty_at, with_quadratics
from torch import nn
from toys import CLASSES, DIM, cnn, learn, learn_stream, make_learner, make_stream, mlp, weights

from cl_bench.contracts import UsageError
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.penalty.ewc import EWC


def fisher_of(learner, strategy, task):
    stats = strategy.collect(learner, task)
    return {n: s / stats["samples"] for n, s in stats.items() if n != "samples"}


@pytest.mark.parametrize("samples", [1, 7, 40, 1000])
def test_empirical_fisher_by_hand(samples):
    stream = make_stream()
    learner = make_learner(stream, nn.Flatten())
    learner.begin(stream[0], Finetune())
    task, W = stream[0], learner.heads[0].weight.detach()
    found = fisher_of(learner, EWC(samples=samples, fisher="empirical"), task)
    batch = task.sample(samples, learner.seed)
    expected = torch.zeros(CLASSES, DIM)
    for x, y in zip(batch["x"], batch["y"], strict=True):
        delta = (W @ x).softmax(0) - F.one_hot(y, CLASSES)
        expected += torch.outer(delta, x).square() / len(batch["y"])
    assert list(found) == ["heads.0.weight"]
    torch.testing.assert_close(found["heads.0.weight"], expected, atol=1e-6, rtol=1e-5)


class Unbatchable(nn.Module):
    """A recurrent layer, a write in place and a branch on values: vmap takes none of them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.cell = nn.GRU(4, 6, batch_first=True)

    def forward(self, x):
        h = torch.zeros(len(x), 6)
        h[:, :] = self.cell(x.unflatten(1, (3, 4)))[0][:, -1]
        return h if h.abs().max().item() < 100 else 0 * h


@pytest.mark.parametrize("model", [mlp, cnn, Unbatchable])
@pytest.mark.parametrize("scenario", ["domain", "task", "class"])
def test_empirical_fisher_is_the_sum_of_squared_gradients(scenario, model):
    shape = (2, 6, 6) if model is cnn else (DIM,)
    stream = make_stream(scenario, shape=shape, n=70)  # more than one piece of 64
    learner = make_learner(stream, model())
    learner.begin(stream[0], Finetune())
    learner.begin(stream[1], Finetune())
    found = fisher_of(learner, EWC(fisher="empirical"), stream[1])
    batch = stream[1].sample(1000, learner.seed)
    expected = {n: torch.zeros_like(p) for n, p in learner.named_trainable().items()}
    for i in range(70):
        single = {k: v[i : i + 1] for k, v in batch.items()}
        learner.zero_grad()
        learner.loss(learner(single), single).backward()
        for n, p in learner.named_trainable().items():
            expected[n] += p.grad.square() / 70
    assert found.keys() == expected.keys()
    for n in expected:
        torch.testing.assert_close(found[n], expected[n], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("samples", "size"), [(70, 20), (40, 7), (5, 20)])
def test_batched_fisher_is_the_mean_of_squared_batch_gradients(samples, size):
    stream = make_stream(n=70)
    learner = make_learner(stream)
    learner.begin(stream[0], Finetune())
    rule = EWC(samples=samples, fisher="batched", fisher_batch=size)
    found = fisher_of(learner, rule, stream[0])
    batch = stream[0].sample(samples, learner.seed)
    expected = {n: torch.zeros_like(p) for n, p in learner.named_trainable().items()}
    for start in range(0, samples, size):
        piece = {k: v[start : start + size] for k, v in batch.items()}
        learner.zero_grad()
        learner.loss(learner(piece), piece).backward()
        for n, p in learner.named_trainable().items():
            expected[n] += p.grad.square() * len(piece["y"]) / samples
    assert found.keys() == expected.keys()
    for n in expected:
        assert float(expected[n].norm()) > 0
        torch.testing.assert_close(found[n], expected[n], atol=1e-8, rtol=1e-4)


def test_true_fisher_is_the_expectation_over_the_models_own_labels():
    stream = make_stream(n=4000)
    learner = make_learner(stream, nn.Flatten())
    learner.begin(stream[0], Finetune())
    task, W = stream[0], learner.heads[0].weight.detach()
    x = task.everything["x"]
    p = (x @ W.t()).softmax(1)
    exact = (p * (1 - p)).t() @ x.square() / len(x)  # E_y (p_c - [y = c])^2 = p_c (1 - p_c)
    found = fisher_of(learner, EWC(samples=4000), task)["heads.0.weight"]
    torch.testing.assert_close(found, exact, atol=0.03 * float(exact.max()), rtol=0.1)
    again = fisher_of(learner, EWC(samples=4000), task)["heads.0.weight"]
    assert torch.equal(found, again)
    empirical = fisher_of(learner, EWC(samples=4000, fisher="empirical"), task)["heads.0.weight"]
    assert float((empirical - exact).norm()) > 5 * float((found - exact).norm())


def test_collecting_the_fisher_changes_nothing():
    class Noisy(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(DIM, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))

    stream = make_stream()
    learner = make_learner(stream, Noisy())
    learner.begin(stream[0], EWC())
    learner.train()
    before, random = copy.deepcopy(learner.state_dict()), torch.get_rng_state()
    one = EWC(samples=30).collect(learner, stream[0])
    other = EWC(samples=30).collect(learner, stream[0])
    assert all(torch.equal(before[k], v) for k, v in learner.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(one[k], v) for k, v in other.items())
    assert learner.training


def test_penalty_of_one_task_by_hand():
    stream, learner, ewc, [(fisher, old)] = with_quadratics(tasks=1)
    assert penalty_at(ewc, learner, stream, old)[0] == 0.0
    theta = torch.randn(CLASSES, DIM)
    value, gradient = penalty_at(ewc, learner, stream, theta)
    assert value == pytest.approx(7.0 / 2 * float((fisher * (theta - old) ** 2).sum()), rel=1e-5)
    torch.testing.assert_close(gradient, 7.0 * fisher * (theta - old))


@pytest.mark.parametrize(("scenario", "absent"), [("class", [1, 2, 3]), ("task", [1, 1, 1])])
def test_a_mean_over_tasks_counts_those_in_which_a_head_had_no_part(scenario, absent):
    stream = make_stream(scenario)
    learner, ewc = make_learner(stream), EWC(information="mean", anchor="latest", samples=20)
    total = {}
    for t, task in enumerate(stream):
        learner.begin(task, ewc)
        with torch.no_grad():
            for p in learner.parameters():
                p.add_(0.05 * torch.randn_like(p))
        stats = ewc.collect(learner, task)
        ewc.consolidate(learner, task, stats)
        for name, s in stats.items():
            if name != "samples":
                total[name] = total.get(name, 0) + s / stats["samples"]
        assert len(stats) - 3 == absent[t]  # the heads that train, beside two layers
        assert ewc.information.keys() == total.keys()
        for name, information in ewc.information.items():
            torch.testing.assert_close(information, total[name] / (t + 1), atol=1e-8, rtol=1e-5)


def test_old_information_fades_also_where_a_task_says_nothing():
    stream = make_stream("task", tasks=2)
    learner, ewc = make_learner(stream), EWC(decay=0.5, samples=20)
    learner.begin(stream[0], ewc)
    ewc.consolidate(learner, stream[0], ewc.collect(learner, stream[0]))
    before = ewc.information["heads.0.weight"].clone()
    learner.begin(stream[1], ewc)
    ewc.consolidate(learner, stream[1], ewc.collect(learner, stream[1]))
    torch.testing.assert_close(ewc.information["heads.0.weight"], before / 2)


@pytest.mark.parametrize("decay", [1.0, 0.6, 0.0])
def test_one_quadratic_stands_for_the_sum_of_all(decay):
    tasks = 3
    stream, learner, ewc, quadratics = with_quadratics(decay, tasks)
    faded = [(decay ** (tasks - 1 - j) * f, theta) for j, (f, theta) in enumerate(quadratics)]

    def whole(theta):
        return sum(7.0 / 2 * float((f * (theta - old) ** 2).sum()) for f, old in faded)

    one, other = torch.randn(2, CLASSES, DIM)
    expected = sum(7.0 * f * (one - old) for f, old in faded)
    values = [penalty_at(ewc, learner, stream, theta) for theta in (one, other)]
    torch.testing.assert_close(values[0][1], expected, atol=1e-4, rtol=1e-4)
    # the sum differs from it by a constant alone
    assert values[0][0] - values[1][0] == pytest.approx(whole(one) - whole(other), rel=1e-4)
    torch.testing.assert_close(ewc.information["heads.0.weight"], sum(f for f, _ in faded))


@pytest.mark.parametrize("anchor", ["sum", "latest"])
@pytest.mark.parametrize(("information", "decay"), [("mean", 1.0), ("sum", 1.0), ("sum", 0.6)])
def test_where_the_pull_points_and_how_strong_it_is(anchor, information, decay):
    stream, learner, ewc, quadratics = with_quadratics(
        decay, tasks=3, anchor=anchor, information=information
    )
    shares = [1 / 3] * 3 if information == "mean" else [decay ** (2 - j) for j in range(3)]
    weighted = [share * f for share, (f, _) in zip(shares, quadratics, strict=True)]
    F_, latest = sum(weighted), quadratics[-1][1]
    pull = sum(f * old for f, (_, old) in zip(weighted, quadratics, strict=True))
    expected = latest if anchor == "latest" else pull / F_
    torch.testing.assert_close(ewc.information["heads.0.weight"], F_)
    torch.testing.assert_close(ewc.centre["heads.0.weight"], expected, atol=1e-4, rtol=1e-4)
    theta = torch.randn(CLASSES, DIM)
    _, gradient = penalty_at(ewc, learner, stream, theta)
    torch.testing.assert_close(gradient, 7.0 * F_ * (theta - expected), atol=1e-4, rtol=1e-4)


def test_weights_without_information_are_not_pulled():
    stream, learner, ewc, _ = with_quadratics(tasks=2)
    name = "heads.0.weight"
    ewc.information[name][0] = 0.0
    learner.begin(stream[1], ewc)
    dead = {name: torch.zeros_like(ewc.information[name]), "samples": torch.tensor(1.0)}
    before = ewc.centre[name].clone()
    ewc.consolidate(learner, stream[1], dead)
    assert torch.equal(ewc.centre[name], before)
    _, gradient = penalty_at(ewc, learner, stream, torch.randn(CLASSES, DIM))
    assert torch.equal(gradient[0], torch.zeros(DIM))


def test_first_task_has_no_penalty_and_zero_strength_is_finetuning():
    stream = make_stream()
    learner = make_learner(stream)
    learner.begin(stream[0], EWC())
    assert EWC().penalty(learner, stream[0].everything, torch.empty(0)) is None
    found = []
    for strategy in (Finetune(), EWC(strength=0.0, samples=10)):
        learner = make_learner(stream)
        learn_stream(learner, strategy, stream)
        found.append(weights(learner))
    assert all(torch.equal(found[0][n], w) for n, w in found[1].items())


def test_heads_of_other_tasks_are_not_penalised_and_keep_their_information():
    stream = make_stream("task")
    learner, ewc = make_learner(stream), EWC(samples=10)
    learn(learner, ewc, stream[0], epochs=1)
    head = ewc.information["heads.0.weight"].clone()
    learn(learner, ewc, stream[1], epochs=1)
    assert set(ewc.information) == {
        *("backbone.fc1.weight", "backbone.fc2.weight", "heads.0.weight", "heads.1.weight")
    }
    assert torch.equal(ewc.information["heads.0.weight"], head)
    learner.begin(stream[2], ewc)
    learner.heads[0].weight.data.add_(100.0)
    learner.backbone.requires_grad_(False)
    assert ewc.penalty(learner, stream[2].everything, torch.empty(0)) is None


def test_strength_holds_weights_back():
    def drift(strength):
        stream = make_stream(tasks=2)
        learner, ewc = make_learner(stream), EWC(strength, samples=40)
        learn(learner, ewc, stream[0])
        before, information = weights(learner), dict(ewc.information)
        learn(learner, ewc, stream[1])
        moved = weights(learner)
        return sum(float((f * (moved[n] - before[n]) ** 2).sum()) for n, f in information.items())

    free, held, tight = drift(0.0), drift(20.0), drift(100.0)
    assert free > 1.5 * held
    assert held > 1.5 * tight > 0


def test_ewc_state_round_trip():
    one, other = assert_goes_on_the_same(lambda: EWC(10.0, samples=20, information="mean"))
    for n, f in one.information.items():
        assert torch.equal(f, other.information[n])
        assert torch.equal(one.centre[n], other.centre[n])
    assert one.metrics() == other.metrics()
    assert one.metrics()["heads.0.weight"]["fisher_mean"] == pytest.approx(
        float(one.information["heads.0.weight"].mean())
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -1.0}, r"strength=-1\.0.*negative"),
        ({"samples": 0}, r"samples=0: at least 1"),
        ({"fisher_batch": 0}, r"fisher_batch=0: at least 1"),
        ({"fisher": "exact"}, r"fisher=exact: use true, empirical or batched"),
        ({"information": "max"}, r"information=max: use sum or mean"),
        ({"anchor": "first"}, r"anchor=first: use sum or latest"),
        ({"information": "mean", "decay": 0.9}, r"decay=0\.9.*does not fade"),
        ({"decay": 1.5}, r"decay=1\.5.*\[0, 1\]"),
    ],
)
def test_ewc_options(options, message):
    with pytest.raises(UsageError, match=message):
        EWC(**options)


def test_of_a_large_network_fewer_gradients_are_in_memory_at_once(monkeypatch):
    stream = make_stream()
    learner, ewc = make_learner(stream), EWC(samples=20, fisher="empirical")
    learner.begin(stream[0], ewc)
    whole, sizes = ewc.collect(learner, stream[0]), []
    gradients = learner.gradients

    def watched(batch, **options):
        sizes.append(len(batch["y"]))
        return gradients(batch, **options)

    monkeypatch.setattr(learner, "gradients", watched)
    weights = sum(p.numel() for p in learner.trainable_parameters())
    monkeypatch.setattr("cl_bench.contracts.task.AT_ONCE", 8 * weights)
    parts = ewc.collect(learner, stream[0])
    assert sizes == [8, 8, 4]
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value)
