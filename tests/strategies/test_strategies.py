"""EWC, ER, Freeze, Joint, Finetune and companions: their mathematics, by hand where possible."""

import copy
import functools
import io

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adam
from toys import (
    CLASSES,
    DIM,
    Silent,
    ToyTask,
    cnn,
    learn,
    learn_stream,
    make_engine,
    make_learner,
    make_stream,
    mlp,
    weights,
)

from cl_bench.contracts import EpochDecision, Needs, Strategy, UsageError
from cl_bench.contracts.strategy import overrides
from cl_bench.data import MemoryData
from cl_bench.experiment import EvalSettings, Experiment, Together
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.baselines.joint import Joint, Union
from cl_bench.strategies.isolation.freeze import Freeze
from cl_bench.strategies.penalty.ewc import EWC
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.strategies.replay.er import ER


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_goes_on_the_same(make, optimizer=None, tasks=3):
    """Two tasks, a round trip of the state, and a third task learned twice."""
    stream = make_stream(tasks=tasks)
    learner, strategy = make_learner(stream, optimizer=optimizer), make()
    learn_stream(learner, strategy, stream[:-1])
    twin, again = copy.deepcopy(learner), make()
    again.load_state_dict(through_a_file(strategy.state_dict()))
    for one, rule in ((learner, strategy), (twin, again)):
        learn(one, rule, stream[-1])
    for name, weight in weights(learner).items():
        assert torch.equal(weight, weights(twin)[name]), name
    return strategy, again


# -- EWC -------------------------------------------------------------------------------------------


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


def with_quadratics(decay=1.0, tasks=3, strength=7.0, **options):
    """EWC after some tasks of one weight matrix, and each task's own (F, theta)."""
    stream = make_stream(tasks=tasks)
    learner = make_learner(stream, nn.Flatten())
    ewc = EWC(strength, decay=decay, samples=40, **options)
    quadratics = []
    for task in stream:
        learner.begin(task, ewc)
        with torch.no_grad():
            learner.heads[0].weight.normal_()
        stats = ewc.collect(learner, task)
        quadratics.append(
            (stats["heads.0.weight"] / stats["samples"], learner.heads[0].weight.detach().clone())
        )
        ewc.consolidate(learner, task, stats)
    return stream, learner, ewc, quadratics


def penalty_at(ewc, learner, stream, theta):
    weight = learner.heads[0].weight
    weight.data.copy_(theta)
    weight.grad = None
    value = ewc.penalty(learner, stream[-1].everything, torch.empty(0))
    value.backward()
    return float(value.detach()), weight.grad.clone()


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


# -- ER --------------------------------------------------------------------------------------------


def numbered(start, count):
    """Samples that say who they are."""
    y = torch.arange(start, start + count)
    return {"x": y[:, None].float() * torch.ones(2), "y": y, "task": torch.zeros_like(y)}


def offered(er, seed, total, batch):
    learner = Silent()
    learner.seed = seed
    er.setup(learner, None)
    for start in range(0, total, batch):
        replayed(er, learner, numbered(start, min(batch, total - start)))
    return er


def replayed(er, learner, batch):
    """What a step learns."""
    learned = er.on_batch(learner, batch)
    er.after_step(learner, learned, torch.empty(0))
    return learned


@settings(max_examples=30)
@given(st.integers(1, 20), st.integers(1, 60), st.integers(1, 13), st.integers(0, 1000))
def test_reservoir_holds_distinct_whole_samples(memory, total, batch, seed):
    er = offered(ER(memory), seed, total, batch)
    kept = min(memory, total)
    assert (er.filled, er.seen) == (kept, total)
    y = er.buffer["y"][:kept]
    assert len(y.unique()) == kept
    assert int(y.max()) < total
    assert torch.equal(er.buffer["x"][:kept, 0].long(), y)
    if total <= memory:
        assert torch.equal(y, torch.arange(total))
    again = offered(ER(memory), seed, total, batch)
    assert torch.equal(again.buffer["y"], er.buffer["y"])


def test_reservoir_is_uniform_and_depends_on_the_seed():
    memory, total, runs = 10, 40, 600
    counts, buffers = torch.zeros(total), set()
    for seed in range(runs):
        er = offered(ER(memory), seed, total, 7)
        counts[er.buffer["y"]] += 1
        buffers.add(tuple(er.buffer["y"].tolist()))
    p = memory / total
    z = (counts - runs * p) / (runs * p * (1 - p)) ** 0.5
    assert len(buffers) == runs
    # 1 - p_value of chi^2 with 39 degrees of freedom: below 75 with probability .9995
    assert float(z.square().sum()) * (1 - p) < 75
    assert float(z.abs().max()) < 4.5


@pytest.mark.parametrize("replay", [None, 1, 6, 25])
def test_batches_are_learned_with_a_uniform_draw_from_the_memory(replay):
    learner = Silent()
    learner.seed = 3
    er = ER(8, replay)
    er.setup(learner, None)
    first = numbered(0, 5)
    assert replayed(er, learner, first) is first  # nothing to replay yet
    drawn = torch.zeros(40)
    for i in range(1, 8):
        held = set(er.buffer["y"][: er.filled].tolist())
        batch = numbered(5 * i, 5)
        learned = replayed(er, learner, batch)
        for key, values in batch.items():
            assert torch.equal(learned[key][:5], values)
            assert len(learned[key]) == 5 + (replay or 5)
            assert learned[key].dtype == values.dtype
        old = learned["y"][5:]
        assert set(old.tolist()) <= held
        assert torch.equal(learned["x"][5:, 0].long(), old)
        drawn += old.bincount(minlength=40)
    assert drawn.sum() == 7 * (replay or 5)


def test_a_longer_draw_covers_the_whole_memory_evenly():
    er = offered(ER(8, replay=8000), 0, 8, 8)
    learner = Silent()
    counts = er.on_batch(learner, numbered(8, 1))["y"][1:].bincount(minlength=8)
    assert len(counts) == 8
    assert float((counts - 1000).abs().max()) < 4.5 * 1000**0.5


@pytest.mark.parametrize("total", [24, 200])
def test_what_a_step_accumulates_draws_from_one_memory(total):
    learner = Silent()
    learner.seed = 3
    small, large = ER(16), ER(16)
    for er in (small, large):
        er.setup(learner, None)
    for start in range(0, total, 8):
        whole = replayed(large, learner, numbered(start, 8))["y"]
        parts = [small.on_batch(learner, numbered(start + i, 2))["y"] for i in (0, 2, 4, 6)]
        assert torch.equal(torch.cat([part[2:] for part in parts]), whole[8:])
        small.after_step(learner, {}, torch.empty(0))
        assert torch.equal(small.buffer["y"], large.buffer["y"])


def test_old_samples_train_their_own_heads():
    stream = make_stream("task", tasks=2)
    learner, er = make_learner(stream), ER(20)
    learn(learner, er, stream[0])
    before = learner.heads[0].weight.detach().clone()
    learn(learner, er, stream[1])
    assert not torch.equal(learner.heads[0].weight, before)
    assert set(er.buffer["task"].tolist()) == {0, 1}


def test_er_forgets_less_than_finetuning():
    losses = []
    for strategy in (Finetune(), ER(60)):
        stream = make_stream(tasks=3, subspace=None)
        learner = make_learner(stream)
        learn_stream(learner, strategy, stream, epochs=10)
        old = stream[0].everything
        losses.append(float(learner.loss(learner(old), old).detach()))
    assert losses[1] < 0.5 * losses[0]


def test_er_state_round_trip():
    one, other = assert_goes_on_the_same(lambda: ER(15))
    assert all(torch.equal(v, other.buffer[k]) for k, v in one.buffer.items())
    assert (one.seen, one.filled) == (other.seen, other.filled)


def test_er_state_is_a_snapshot():
    er = offered(ER(10), 0, 10, 5)
    state = er.state_dict()
    kept = copy.deepcopy(state)
    learner = Silent()
    ahead = replayed(er, learner, numbered(10, 200))
    assert all(torch.equal(v, state["buffer"][k]) for k, v in kept["buffer"].items())
    for _ in range(2):  # going on from it leaves it as it is
        again = ER(10)
        again.load_state_dict(state)
        assert torch.equal(replayed(again, learner, numbered(10, 200))["y"], ahead["y"])
        assert torch.equal(again.buffer["y"], er.buffer["y"])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"memory": 0}, r"memory=0: at least 1"), ({"replay": 0}, r"replay=0: at least 1, or null")],
)
def test_er_options(options, message):
    with pytest.raises(UsageError, match=message):
        ER(**options)


# -- Freeze ----------------------------------------------------------------------------------------


def normed():
    torch.manual_seed(1)
    block = functools.partial(nn.Sequential)
    return nn.Sequential(
        block(nn.Linear(DIM, 16), nn.BatchNorm1d(16), nn.ReLU()),
        nn.Dropout(0.1),
        block(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU()),
    )


@pytest.mark.parametrize(
    "optimizer",
    [functools.partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.1), functools.partial(Adam)],
)
@pytest.mark.parametrize("n_blocks", [0, 1, 2])
@pytest.mark.parametrize("start_task", [0, 1, 2])
def test_frozen_blocks_stay_bit_for_bit(optimizer, n_blocks, start_task):
    stream = make_stream()
    learner = make_learner(stream, normed(), optimizer)
    freeze = Freeze(n_blocks, start_task)
    blocks = learner.blocks()
    assert len(blocks) == 2
    for task in stream:
        before = [copy.deepcopy(block.state_dict()) for block in blocks]
        used = learn(learner, freeze, task, epochs=2)
        held = {id(p) for group in used.param_groups for p in group["params"]}
        for i, block in enumerate(blocks):
            frozen = i < n_blocks and task.index >= start_task
            for k, v in block.state_dict().items():
                assert torch.equal(v, before[i][k]) == frozen, k
            for p in block.parameters():
                assert (id(p) in held) != frozen
                assert (p in used.state) != frozen


def test_freezing_more_than_there_is_is_refused():
    stream = make_stream()
    learner = make_learner(stream, normed())
    with pytest.raises(UsageError, match=r"n_blocks=3.*2 blocks"):
        learner.begin(stream[0], Freeze(3))
    for options in ({"n_blocks": -1}, {"start_task": -1}):
        with pytest.raises(UsageError, match=r"=-1"):
            Freeze(**options)


def test_freezing_everything_leaves_nothing_to_train():
    stream = make_stream()
    learner = make_learner(stream, normed())
    learner.begin(stream[1], Freeze(2))
    assert learner.configure_optimizers()  # the head remains
    learner.heads.requires_grad_(False)
    with pytest.raises(UsageError, match=r"nothing is left to train.*freeze less"):
        learner.configure_optimizers()


# -- Joint and Finetune ----------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 100))
def test_union_is_all_parts_in_order(sizes, seed):
    y = torch.arange(sum(sizes))
    x = torch.randn(sum(sizes), 3)
    parts = [
        MemoryData({"x": a, "y": b}) for a, b in zip(x.split(sizes), y.split(sizes), strict=True)
    ]
    union = Union(parts)
    assert len(union) == len(y)
    rng = torch.Generator().manual_seed(seed)
    for index in (
        torch.randperm(len(y), generator=rng),
        torch.randint(len(y), (2 * len(y),), generator=rng),
    ):
        batch = union[index]
        assert torch.equal(batch["y"], y[index])
        assert torch.equal(batch["x"], x[index])


def test_joint_learns_the_union_of_what_was_seen():
    stream = make_stream("task")
    for t in range(3):
        data = Joint().plan(stream, t).data
        everything = data[torch.arange(len(data))]
        for k in ("x", "y", "task"):
            expected = torch.cat([task.everything[k] for task in stream[: t + 1]])
            assert torch.equal(everything[k], expected)
    assert [Joint(when="last").plan(stream, t) is None for t in range(3)] == [*(True, True, False)]
    with pytest.raises(UsageError, match=r"when=often: use every or last"):
        Joint(when="often")


@pytest.mark.parametrize("scenario", ["domain", "task", "class"])
@pytest.mark.parametrize("fresh", [True, False])
def test_joint_starts_from_fresh_weights(fresh, scenario):
    stream = make_stream(scenario)
    learner, joint = make_learner(stream), Joint(fresh)
    start = weights(learner)
    learn_stream(learner, joint, stream[:2])
    learned = weights(learner)
    learner.begin(stream[2], joint)
    for name, weight in weights(learner).items():
        assert torch.equal(weight, start[name] if fresh else learned[name])
    assert all(p.requires_grad for p in learner.parameters())


def test_joint_from_scratch_is_one_training_on_all_data():
    stream = make_stream()
    learner, single = make_learner(stream), make_learner(stream)
    learn_stream(learner, Joint(), stream)
    everything = {k: torch.cat([t.everything[k] for t in stream]) for k in ("x", "y", "task")}
    whole = ToyTask(2, 0, range(CLASSES), everything["x"], everything["y"])
    learn(single, Finetune(), whole)
    for name, weight in weights(single).items():
        torch.testing.assert_close(weights(learner)[name], weight)


def test_joint_at_the_last_task_alone_ends_the_same():
    stream = make_stream(tasks=2)
    found = []
    for when in ("every", "last"):
        learner = make_learner(stream)
        strategy = Joint(when=when)
        engine = make_engine(learner, strategy)
        Experiment(stream, strategy, engine, EvalSettings(), Silent(), Silent()).run()
        found.append(weights(learner))
    assert all(torch.equal(found[0][n], w) for n, w in found[1].items())


def test_finetune_is_the_plain_loop():
    stream = make_stream()
    learner, plain = make_learner(stream), make_learner(stream)
    learn_stream(learner, Finetune(), stream, epochs=1, batch_size=40)
    optimizer = SGD(plain.parameters(), lr=0.05)
    for task in stream:
        batch = task.everything
        optimizer.zero_grad()
        F.cross_entropy(plain.heads[0](plain.backbone(batch["x"])), batch["y"]).backward()
        optimizer.step()
    for name, weight in weights(plain).items():
        torch.testing.assert_close(weights(learner)[name], weight)


# -- companions ------------------------------------------------------------------------------------


def test_two_that_rewrite_gradients_are_refused():
    with pytest.raises(UsageError, match=r"gpm and other both rewrite gradients.*run one of them"):
        Together({"gpm": GPM(), "er": ER(), "other": GPM()})


class Deciding(Strategy):
    def __init__(self, decision=None):
        self.decision = decision

    def after_epoch(self, learner, task, progress):
        return self.decision


def test_two_answers_to_one_question_are_refused():
    with pytest.raises(UsageError, match=r"one and two both decide 'plan'.*run one of them"):
        Together({"one": Joint(), "er": ER(), "two": Joint()})
    both = Together({"er": ER(), "joint": Joint()})
    assert isinstance(both.plan(make_stream(), 1).data, Union)


def test_decisions_after_an_epoch_add_up():
    def decided(*decisions):
        members = {str(i): Deciding(d) for i, d in enumerate(decisions)}
        return Together(members).after_epoch(None, None, None)

    assert decided(None, None) is None
    assert decided(None, EpochDecision(stop=True)) == EpochDecision(stop=True)
    slower = EpochDecision(scale_rate=0.5), EpochDecision(scale_rate=0.2, reset_rate=True)
    assert decided(*slower) == EpochDecision(scale_rate=0.1, reset_rate=True)
    assert decided(EpochDecision(rebuild_optimizer=True), *slower).rebuild_optimizer


def test_needs_of_companions_add_up():
    class Text(Strategy):
        needs = Needs(task_id_at_test=True, shardable=False, modalities=frozenset({"text", "x"}))

    class Image(Strategy):
        needs = Needs(modalities=frozenset({"image", "x"}))

    needs = Together({"gpm": GPM(), "text": Text(), "image": Image()}).needs
    assert needs == Needs(True, True, False, modalities=frozenset({"x"}))


def test_penalties_are_summed():
    stream, learner, one, _ = with_quadratics(tasks=1)
    _, _, other, _ = with_quadratics(tasks=2, strength=3.0)
    theta = torch.randn(CLASSES, DIM)
    both = Together({"one": one, "er": ER(), "other": other})
    found = [penalty_at(s, learner, stream, theta) for s in (one, other, both)]
    assert found[2][0] == pytest.approx(found[0][0] + found[1][0], rel=1e-5)
    torch.testing.assert_close(found[2][1], found[0][1] + found[1][1])
    nothing = Together({"er": ER(), "finetune": Finetune()})
    assert nothing.penalty(learner, stream[0].everything, torch.empty(0)) is None


def make_three():
    return Together({"gpm": GPM(0.8, samples=40), "er": ER(20), "ewc": EWC(5.0, samples=20)})


def test_states_of_companions_are_apart():
    one, other = assert_goes_on_the_same(make_three)
    state = one.state_dict()
    assert list(state) == ["gpm", "er", "ewc"]
    assert {"memory", "rows_per_sample"} <= set(state["gpm"])
    assert set(state["er"]) == {"buffer", "seen", "rng"}
    assert set(state["ewc"]) == {"information", "centre", "tasks"}
    for a, b in zip(one.members, other.members, strict=True):
        assert a.metrics() == b.metrics()


def test_a_companion_of_two_layers_of_names_keeps_its_statistics():
    stream = make_stream()
    learner = make_learner(stream)
    alone, both = (
        EWC(samples=20),
        Together({"a": Finetune(), "a/b": Finetune(), "ewc": EWC(samples=20)}),
    )
    learn(learner, alone, stream[0], epochs=0)
    learn(learner, both, stream[0], epochs=0)
    assert list(both.members[2].information) == list(alone.information)
    for n, f in alone.information.items():
        assert torch.equal(both.members[2].information[n], f)


def test_a_companion_that_does_nothing_changes_nothing():
    stream = make_stream()
    found = []
    for strategy in (GPM(0.8), Together({"gpm": GPM(0.8), "finetune": Finetune()})):
        learner = make_learner(stream, optimizer=functools.partial(Adam, lr=0.01))
        learn_stream(learner, strategy, stream)
        found.append(weights(learner))
    assert all(torch.equal(found[0][n], w) for n, w in found[1].items())


def test_frozen_blocks_stay_frozen_beside_gpm():
    stream = make_stream()
    learner = make_learner(
        stream, mlp(bias=True), functools.partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.01)
    )
    both = Together({"gpm": GPM(0.8, samples=40), "freeze": Freeze(1)})
    learn(learner, both, stream[0])
    before = copy.deepcopy(learner.backbone.fc1.state_dict())
    for task in stream.tasks[1:]:
        learn(learner, both, task)
    assert all(torch.equal(before[k], v) for k, v in learner.backbone.fc1.state_dict().items())


def test_order_of_hooks():
    calls = []

    class Spy(Strategy):
        def __init__(self, name):
            self.name = name

        def setup(self, learner, task):
            calls.append(("setup", self.name))

        def on_batch(self, learner, batch):
            calls.append(("on_batch", self.name))
            return batch

        def constrain(self, learner):
            calls.append(("constrain", self.name))

        def after_step(self, learner, batch, out):
            calls.append(("after_step", self.name))

        def release(self, learner):
            calls.append(("release", self.name))

    stream = make_stream(n=10)
    learn(make_learner(stream), Together({"a": Spy("a"), "b": Spy("b")}), stream[0], epochs=1)
    hooks = ("setup", "on_batch", "constrain", "after_step")
    expected = [(hook, name) for hook in hooks for name in "ab"]
    assert calls == [*expected, ("release", "b"), ("release", "a")]


def test_what_others_ask_of_a_strategy_it_declares():
    assert (Finetune.bound, Joint.bound, GPM.bound) == ("lower", "upper", None)
    stopping, going = Freeze(early_stop=0.9), Freeze()
    assert overrides(stopping, "after_epoch")
    assert not overrides(going, "after_epoch")
    assert not overrides(Together({"freeze": going, "er": ER()}), "after_epoch")
    assert overrides(Together({"er": ER(), "freeze": stopping}), "after_epoch")
    assert going.needs.said("first_task", 1) == "strategy.start_task=1"
    assert Needs(first_task=2).said("first_task", 2) == "first_task=2"
    er = ER()
    assert er.members == (er,)
