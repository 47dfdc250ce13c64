"""What strategies stand on: raw gradients without side effects, taps, heads, held layers, packs."""

import copy
import functools
import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from toys import (
    CLASSES,
    DIM,
    IMAGE,
    ToyTask,
    cnn,
    learn,
    make_engine,
    make_learner,
    make_stream,
    mlp,
    weights,
)

from cl_bench.contracts import Plan, Protect, UsageError
from cl_bench.experiment import Together
from cl_bench.learners import DivergedError, objective
from cl_bench.packed import stepping
from cl_bench.packed.stepping import short_step
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.isolation.freeze import Freeze
from cl_bench.strategies.penalty.ewc import EWC
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.strategies.replay.er import ER
from cl_bench.subspace import confinement


def noisy():
    """Everything with a state of its own: statistics, random numbers, modes."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(DIM, 10),
        nn.BatchNorm1d(10),
        nn.Dropout(0.5),
        nn.ReLU(),
        nn.Linear(10, 8, bias=False),
        nn.LayerNorm(8),
    )


def begun(scenario="domain", t=0, model=None, **options):
    stream = make_stream(scenario, **options)
    learner = make_learner(stream, model)
    for task in stream[: t + 1]:
        learner.begin(task, Finetune())
    return stream, learner


# -- gradients -------------------------------------------------------------------------------------


def manual(learner, value):
    """Gradients by ``backward``, on a copy's evaluation mode."""
    twin = copy.deepcopy(learner).eval()
    twin.zero_grad()
    value(twin).backward()
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad
        for n, p in twin.named_parameters()
        if p.requires_grad
    }


def assert_same_gradients(found, expected, tolerance=1e-6):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=tolerance, rtol=1e-4)


@pytest.mark.parametrize("model", [mlp, cnn, noisy])
@pytest.mark.parametrize("scenario", ["domain", "task", "class"])
def test_gradients_are_those_of_backward(scenario, model):
    options = {"shape": IMAGE} if model is cnn else {}
    stream, learner = begun(scenario, 1, model(), **options)
    batch = stream[1].everything
    found = learner.gradients(batch)
    assert_same_gradients(found, manual(learner, lambda m: m.loss(m(batch), batch)))
    rows = torch.arange(len(batch["y"]))
    found = learner.gradients(batch, of="logits")
    assert_same_gradients(found, manual(learner, lambda m: m(batch)[rows, batch["y"]].mean()))


@pytest.mark.parametrize("of", ["loss", "logits"])
@pytest.mark.parametrize("model", [mlp, cnn, noisy])
@pytest.mark.parametrize("scenario", ["domain", "task", "class"])
def test_gradients_per_sample_are_those_of_single_samples(scenario, model, of):
    options = {"shape": IMAGE} if model is cnn else {}
    stream, learner = begun(scenario, 1, model(), n=6, **options)
    batch = stream[1].everything
    found = learner.gradients(batch, of, per_sample=True)
    for i in range(6):
        single = learner.gradients({k: v[i : i + 1] for k, v in batch.items()}, of)
        assert_same_gradients({n: g[i] for n, g in found.items()}, single)
    assert_same_gradients({n: g.mean(0) for n, g in found.items()}, learner.gradients(batch, of))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("per_sample", [True, False])
def test_gradients_and_taps_have_no_side_effects(training, per_sample):
    stream, learner = begun(model=noisy())
    learner.train(training)
    learner.backbone[4].eval()  # somebody's own choice for one part
    for i, p in enumerate(learner.parameters()):
        p.grad = None if i % 2 else torch.full_like(p, float(i))
    grads = [None if p.grad is None else (p.grad, p.grad.clone()) for p in learner.parameters()]
    state, random = copy.deepcopy(learner.state_dict()), torch.get_rng_state()
    modes = [m.training for m in learner.modules()]
    batch = stream[0].everything
    first = learner.gradients(batch, per_sample=per_sample)
    again = learner.gradients(batch, per_sample=per_sample)
    learner.gradients(batch, "logits", per_sample)
    learner.tap(learner.layers(Protect()), [batch])
    learner.draw_labels(batch, torch.Generator().manual_seed(0))
    learner.performance(batch)
    assert all(torch.equal(first[n], g) for n, g in again.items())
    assert not any(g.requires_grad for g in first.values())
    assert all(torch.equal(state[k], v) for k, v in learner.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert [m.training for m in learner.modules()] == modes
    for kept, p in zip(grads, learner.parameters(), strict=True):
        assert p.grad is None if kept is None else p.grad is kept[0]
        assert kept is None or torch.equal(p.grad, kept[1])


def test_gradients_work_inside_no_grad_and_cover_what_trains():
    stream, learner = begun("task", 1, mlp())
    learner.backbone.fc1.requires_grad_(False)
    with torch.no_grad():
        found = learner.gradients(stream[1].everything)
    assert set(found) == {"backbone.fc2.weight", "heads.1.weight"}
    assert set(found) == set(learner.named_trainable())
    assert [id(p) for p in learner.trainable_parameters()] == [
        id(p) for p in learner.named_trainable().values()
    ]


def test_parameters_out_of_reach_have_zero_gradient():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(DIM, 4), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x)

    stream, learner = begun(model=Idle())
    for per_sample in (False, True):
        found = learner.gradients(stream[0].everything, per_sample=per_sample)
        assert float(found["backbone.idle.weight"].abs().sum()) == 0.0
        assert float(found["backbone.used.weight"].abs().sum()) > 0.0


def test_labels_are_drawn_from_the_prediction():
    stream, learner = begun("task", 1, mlp(), n=3000)
    batch = stream[1].everything
    batch["x"] = batch["x"][:1].expand_as(batch["x"]).clone()
    drawn = learner.draw_labels(batch, torch.Generator().manual_seed(0))
    likelihood = learner(batch)[0].softmax(0).detach()
    counts = drawn["y"].bincount(minlength=2 * CLASSES)
    assert torch.equal(counts[:CLASSES], torch.zeros(CLASSES, dtype=torch.long))  # another head's
    torch.testing.assert_close(counts / 3000, likelihood, atol=0.03, rtol=0)
    assert torch.equal(drawn["x"], batch["x"])


# -- taps ------------------------------------------------------------------------------------------


def test_tap_sees_inputs_in_evaluation_mode():
    stream, learner = begun(model=noisy())
    learn(learner, Finetune(), stream[0], epochs=1)
    learner.train()
    batch = stream[0].everything
    layers = learner.layers(Protect(bias="augmented"))
    assert [layer.name for layer in layers] == ["backbone.0", "backbone.4", "heads.0"]
    pieces = [{k: v[i : i + 15] for k, v in batch.items()} for i in (0, 15, 30)]
    moments = learner.tap(layers, pieces)
    twin = copy.deepcopy(learner).eval()
    x = batch["x"]
    hidden = twin.backbone[:4](x)
    inputs = {
        "backbone.0": torch.cat([x, torch.ones(len(x), 1)], 1),
        "backbone.4": hidden,
        "heads.0": twin.backbone(x),
    }
    for name, rows in inputs.items():
        rows = rows.detach().double()
        torch.testing.assert_close(moments[name].gram, rows.t() @ rows, atol=1e-3, rtol=1e-4)
        assert (moments[name].rows, moments[name].samples) == (40, 40)


# -- hold ------------------------------------------------------------------------------------------


def test_held_modules_stand_still_until_the_next_task():
    stream, learner = begun(model=noisy())

    class Holding(Finetune):
        def setup(self, learner, task):
            learner.hold([learner.backbone[0], learner.backbone[1]])

    before = copy.deepcopy(learner.backbone.state_dict())
    optimizer = learn(learner, Holding(), stream[0])
    held = {id(p) for i in (0, 1) for p in learner.backbone[i].parameters()}
    assert not held & {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, value in learner.backbone.state_dict().items():
        assert torch.equal(value, before[name]) == (name[0] in "01"), name
    learn(learner, Finetune(), stream[1])
    for name, value in learner.backbone.state_dict().items():
        assert not torch.equal(value, before[name]), name


def test_held_statistics_stay_whatever_mode_is_asked_for():
    _, learner = begun(model=noisy())
    learner.train()
    learner.hold([learner.backbone[1]])
    assert learner.training
    assert not learner.backbone[1].training
    assert learner.backbone[2].training
    learner.eval()
    learner.train()
    assert not learner.backbone[1].training
    learner.held_norms.clear()
    learner.train()
    assert learner.backbone[1].training


def test_what_the_user_froze_stays_frozen():
    model = mlp()
    model.fc1.requires_grad_(False)
    stream, learner = begun(model=model)
    before = model.fc1.weight.clone()
    for strategy in (Freeze(2, start_task=0), Finetune()):
        learn(learner, strategy, stream[0], epochs=1)
    assert torch.equal(model.fc1.weight, before)
    assert model.fc2.weight.requires_grad


# -- heads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scenario", "trained", "width"),
    [
        ("domain", [{0}, {0}, {0}], [3, 3, 3]),
        ("task", [{0}, {1}, {2}], [3, 6, 9]),
        ("class", [{0}, {0, 1}, {0, 1, 2}], [3, 6, 9]),
    ],
)
def test_heads_of_each_scenario(scenario, trained, width):
    stream = make_stream(scenario)
    learner = make_learner(stream)
    assert len(learner.heads) == (1 if scenario == "domain" else 3)
    for t, task in enumerate(stream):
        before = weights(learner)
        learn(learner, Finetune(), task, epochs=1)
        moved = {
            int(name.split(".")[1])
            for name, w in weights(learner).items()
            if name.startswith("heads.") and not torch.equal(w, before[name])
        }
        assert moved == trained[t]
        out = learner(task.everything)
        assert out.shape[1] == width[t]
        own = torch.zeros(width[t], dtype=torch.bool)
        own[task.classes.start : task.classes.stop] = True
        if scenario == "task":
            assert torch.isinf(out[:, ~own]).all()
            assert torch.isfinite(out[:, own]).all()
        else:
            assert torch.isfinite(out).all()
        single = learner(task.everything, head=task.head)
        torch.testing.assert_close(out[:, own], single)


def test_earlier_tasks_keep_their_head_after_later_ones():
    stream, learner = begun("task", 2)
    for task in stream:
        out = learner(task.everything)
        assert set(out.argmax(1).tolist()) <= set(task.classes)
        torch.testing.assert_close(
            out[:, task.classes.start : task.classes.stop],
            learner(task.everything, head=task.head),
        )


def test_heads_do_not_depend_on_how_many_there_are():
    few, many = (make_learner(make_stream("task", tasks=n), mlp()) for n in (2, 4))
    for one, other in zip(few.heads, many.heads, strict=False):
        assert torch.equal(one.weight, other.weight)
    assert not torch.equal(many.heads[0].weight, many.heads[1].weight)


def test_reset_gives_the_weights_of_construction():
    stream, learner = begun(model=noisy())
    start = copy.deepcopy(learner.state_dict())
    learn(learner, Finetune(), stream[0])
    learner.reset_weights()
    assert all(torch.equal(start[k], v) for k, v in learner.state_dict().items())


# -- packed and plain training ---------------------------------------------------------------------

STRATEGIES = {
    "finetune": Finetune,
    "gpm": functools.partial(GPM, 0.8, samples=40),
    "ewc": functools.partial(EWC, 5.0, samples=20),
    "er": functools.partial(ER, 20),
}
OPTIMIZERS = {
    "SGD": functools.partial(SGD, lr=0.05),
    "Adam": functools.partial(Adam, lr=0.01),
    "momentum and decay": functools.partial(SGD, lr=0.02, momentum=0.9, weight_decay=0.01),
}


def trained(strategy, optimizer, pack, n=43, model=None, epochs=2):
    stream = make_stream(tasks=2, n=n)  # 4 batches of 10 and one of 3
    learner = make_learner(stream, model or mlp(), optimizer, pack=pack)
    engine = make_engine(learner, strategy, epochs=epochs, pack=pack)
    for t, task in enumerate(stream):
        engine.learn(task, strategy.plan(stream, t))
    return weights(learner), learner.learned_steps


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_packs_learn_the_same(name, optimizer, monkeypatch):
    monkeypatch.setattr(confinement, "WORTHWHILE", float("-inf"))
    make, rule = STRATEGIES[name], OPTIMIZERS[optimizer]
    expected, steps = trained(make(), rule, pack=1)
    found, packed_steps = trained(make(), rule, pack=64)
    assert steps == packed_steps == 2 * 5  # in the last task
    for n, weight in expected.items():
        torch.testing.assert_close(found[n], weight, atol=2e-5, rtol=1e-4)


@pytest.fixture
def rule():
    optimizer = SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1, momentum=0.9)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    return optimizer


def test_a_short_step_is_a_step_and_its_hooks_hear_of_it(rule):
    heard = []
    rule.register_step_post_hook(lambda optimizer, args, kwargs: heard.append(optimizer))
    step = short_step(rule)
    assert step != rule.step
    for _ in range(2):
        step()
    expected = 1 - 0.1 * (1 + 1.9)
    torch.testing.assert_close(
        rule.param_groups[0]["params"][0].detach(), torch.full((3,), expected)
    )
    assert heard == [rule, rule]


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({"foreach": False}, True),
        ({}, False),  # torch may take all weights at once
        *(
            ({"foreach": False, **other}, False)
            for other in ({"weight_decay": 0.1}, {"momentum": 0.9}, {"maximize": True})
        ),
    ],
    ids=str,
)
def test_a_short_step_of_sgd_has_torchs_bits(options, plain):
    def steps(short):
        rng = torch.Generator().manual_seed(0)
        w = nn.Parameter(torch.randn(7, 5, generator=rng))
        idle = nn.Parameter(torch.ones(2))  # has no gradient
        optimizer = SGD([{"params": [w], "lr": 0.3}, {"params": [idle]}], lr=0.1, **options)
        assert stepping._is_plain(optimizer) == plain
        step = short_step(optimizer) if short else optimizer.step
        for _ in range(3):
            w.grad = torch.randn(7, 5, generator=rng)
            step()
        assert torch.equal(idle, torch.ones(2))
        return w.detach(), optimizer.state_dict()

    (ours, our_state), (torchs, torchs_state) = steps(True), steps(False)
    assert torch.equal(ours, torchs)
    assert our_state["state"].keys() == torchs_state["state"].keys()


def test_a_short_backward_pass_has_torchs_gradients_and_torchs_complaints():
    rng = torch.Generator().manual_seed(0)
    w = nn.Parameter(torch.randn(5, 3, generator=rng))
    idle = nn.Parameter(torch.ones(2))

    def passes(backward):
        w.grad = None
        for scale in (1.0, 0.5):  # the second adds up
            backward((w.tanh() * scale).square().mean(), torch.tensor(0.7))
        assert idle.grad is None
        return w.grad

    assert torch.equal(passes(stepping.short_backward), passes(lambda loss, g: loss.backward(g)))
    with pytest.raises(RuntimeError, match="does not require grad"):
        stepping.short_backward(torch.ones(()), torch.ones(()))
    loss = w.tanh().sum()
    stepping.short_backward(loss, torch.ones(()))
    with pytest.raises(RuntimeError, match="second time"):
        stepping.short_backward(loss, torch.ones(()))


def scheduled(rule):
    torch.optim.lr_scheduler.StepLR(rule, 1)


def hooked(rule):
    rule.register_step_pre_hook(lambda optimizer, args, kwargs: None)


@pytest.mark.parametrize("watch", [scheduled, hooked])
def test_a_step_that_somebody_watches_stays_whole(rule, watch):
    watch(rule)
    assert short_step(rule) == rule.step


def test_a_profiler_sees_packed_steps_by_name(rule):
    with torch.autograd.profiler.profile() as profile:
        short_step(rule)()
    assert any("Optimizer.step#SGD" in event.name for event in profile.function_events)


def test_packs_of_any_size_learn_bit_for_bit_the_same_with_dropout_and_norms():
    found = [trained(Finetune(), OPTIMIZERS["SGD"], pack, model=noisy())[0] for pack in (2, 3, 64)]
    for other in found[1:]:
        assert all(torch.equal(found[0][n], w) for n, w in other.items())


def test_the_engine_is_the_plain_loop():
    stream = make_stream(tasks=2)
    by_engine, by_hand = make_learner(stream), make_learner(stream)
    engine = make_engine(by_engine, GPM(0.8), epochs=3)
    strategy = GPM(0.8)
    for task in stream:
        engine.learn(task, Plan(task.train))
        learn(by_hand, strategy, task, epochs=3)
    for n, weight in weights(by_hand).items():
        torch.testing.assert_close(weights(by_engine)[n], weight)


@pytest.mark.parametrize("pack", [1, 4])
def test_the_mean_loss_of_an_epoch(pack):
    stream = make_stream(tasks=1, n=40)
    learner = make_learner(stream, optimizer=functools.partial(SGD, lr=0.0), pack=pack)
    seen = []

    class Watching(Finetune):
        def after_epoch(self, learner, task, progress):
            seen.append((progress.epoch, progress.max_epochs, progress.train_loss))

    make_engine(learner, Watching(), epochs=2, pack=pack).learn(stream[0], Plan(stream[0].train))
    batch = stream[0].everything
    loss = float(learner.loss(learner(batch), batch).detach())
    assert seen == [(1, 2, pytest.approx(loss, rel=1e-5)), (2, 2, pytest.approx(loss, rel=1e-5))]


# -- losses that are not finite --------------------------------------------------------------------


def poisoned(step, value, n=100, batch=10):
    """A task whose batches are all fine up to one, in the order of its first epoch."""
    from cl_bench.experiment import TrainLoader

    task = make_stream(n=n)[1]
    order = torch.cat([b["y"] for b in TrainLoader(Numbers(n), batch, 0, 1)])
    task.data.tensors["x"][order[step * batch]] = value
    return task


class Numbers:
    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return {"y": index}


@pytest.mark.parametrize("pack", [1, 4, 64])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("window", [1, 3, 64])
def test_a_loss_that_is_not_finite_names_task_and_step(pack, value, window, monkeypatch):
    monkeypatch.setattr(objective, "LOSS_WINDOW", window)
    task = poisoned(7, value)
    learner = make_learner(make_stream(n=100), pack=pack)
    engine = make_engine(learner, Finetune(), pack=pack)
    with pytest.raises(DivergedError, match=r"became nan in task 't1' at step 7; lower the"):
        engine.learn(task, Plan(task.train))


def test_divergence_stops_the_run_and_is_a_usage_error():
    stream = make_stream()
    learner = make_learner(stream, optimizer=functools.partial(SGD, lr=1e30))
    engine = make_engine(learner, Finetune(), epochs=3)
    with pytest.raises(UsageError, match=r"in task 't0' at step \d"):
        engine.learn(stream[0], Plan(stream[0].train))


# -- misuse ----------------------------------------------------------------------------------------


def test_a_model_of_another_shape_is_refused():
    with pytest.raises(UsageError, match=r"does not accept inputs of shape \(2, 6, 6\).*model="):
        make_learner(make_stream(shape=IMAGE), nn.Linear(5, 4))


def test_labels_outside_the_head_are_refused():
    task = make_stream()[0]
    wrong = ToyTask(0, 0, range(2), task.everything["x"], task.everything["y"])
    learner = make_learner(make_stream())
    with pytest.raises(UsageError, match=r"labels 0\.\.2.*0\.\.1"):
        make_engine(learner, Finetune()).learn(wrong, Plan(wrong.train))


def test_evaluation_scores_every_task_and_changes_nothing():
    stream, learner = begun("task", 2)
    learner.train()
    engine = make_engine(learner, Finetune())
    before, random = copy.deepcopy(learner.state_dict()), torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = engine.evaluate(list(stream), batch_size=7, max_samples=None)
    for task in stream:
        batch = task.everything
        right = (learner(batch).argmax(1) == batch["y"]).double().mean()
        assert scores[task.name] == pytest.approx(float(right))
    assert all(torch.equal(before[k], v) for k, v in learner.state_dict().items() if k in before)
    assert torch.equal(random, torch.get_rng_state())


# -- what is frozen stays frozen -------------------------------------------------------------------


def with_bias(stream, **options):
    return make_learner(stream, mlp(bias=True), head_bias=True, **options)


@pytest.mark.parametrize("order", ["gpm first", "er first"])
@pytest.mark.parametrize(("scenario", "heads"), [("domain", "auto"), ("task", "always")])
def test_replay_does_not_train_the_biases_that_gpm_froze(scenario, heads, order):
    stream = make_stream(scenario)
    learner = with_bias(stream)
    members = {
        "gpm": GPM(0.9, samples=40, protect=Protect(bias="frozen", heads=heads)),
        "er": ER(memory=30),
    }
    if order == "er first":
        members = dict(reversed(members.items()))
    both = Together(members)
    learn(learner, both, stream[0])
    biases = {n: p.clone() for n, p in weights(learner).items() if n.endswith("bias")}
    before = weights(learner)
    learn(learner, both, stream[1])
    after = weights(learner)
    assert len(biases) > 2
    assert all(torch.equal(after[n], b) for n, b in biases.items())
    current = f"heads.{stream[1].head}.weight"
    assert not torch.equal(after[current], before[current])
    assert scenario == "domain" or learner.heads[0].weight.requires_grad, "old heads do learn"


def test_heads_leave_what_their_owner_froze():
    stream = make_stream("task")
    learner = with_bias(stream)
    learner.heads[1].bias.requires_grad_(False)
    learner.remember_initial_state()
    for task in stream[:2]:
        learner.begin(task, ER())
    assert not learner.heads[1].bias.requires_grad
    assert learner.heads[1].weight.requires_grad
    assert learner.heads[0].bias.requires_grad


# -- where to project ------------------------------------------------------------------------------


class Grouped(GPM):
    """GPM with options of its own for some parameters, as a user's strategy may have."""

    def __init__(self, options, where):
        super().__init__(0.9, samples=40)
        self.options, self.where = options, where
        self.extra = nn.Parameter(torch.zeros(1))

    def param_groups(self, learner):
        named = learner.named_trainable()
        first = [p for n, p in named.items() if ("fc1" in n) == (self.where == "first")]
        rest = [p for n, p in named.items() if ("fc1" in n) != (self.where == "first")]
        if self.where == "own":
            return [{"params": first + rest}, {"params": [self.extra], **self.options}]
        return [{"params": first, **self.options}, {"params": rest}]


@pytest.mark.parametrize(
    ("options", "where", "expected"),
    [
        ({"weight_decay": 0.1}, "first", "step"),
        ({"weight_decay": 0.0}, "first", "input"),
        ({"momentum": 0.9, "lr": 0.5}, "first", "input"),
        ({"weight_decay": 0.1}, "own", "input"),
    ],
)
def test_projectable_looks_at_the_groups_options(options, where, expected):
    stream = make_stream()
    learner = make_learner(stream)
    strategy = Grouped(options, where)
    learner.begin(stream[0], strategy)
    assert learner.projectable == expected
    # The other way round: the optimizer decays, and no group of the network's weights does.
    decaying = make_learner(stream, optimizer=functools.partial(SGD, lr=0.1, weight_decay=0.1))
    assert decaying.projectable == "step"
    free = Grouped({"weight_decay": 0.0}, "all")
    free.param_groups = lambda learner: [
        {"params": learner.trainable_parameters(), "weight_decay": 0.0}
    ]
    decaying.begin(stream[0], free)
    assert decaying.projectable == "input"


def test_a_group_with_weight_decay_leaves_the_memory_alone():
    stream = make_stream()
    learner = make_learner(stream)
    strategy = Grouped({"weight_decay": 0.1}, "first")
    learn(learner, strategy, stream[0])
    before, M = weights(learner)["backbone.fc1.weight"], strategy.memory["backbone.fc1"]
    learn(learner, strategy, stream[1])
    change = weights(learner)["backbone.fc1.weight"] - before
    assert change.norm() > 1e-2
    assert (change @ M.to(change)).norm() < 1e-5 * change.norm()


# -- a bias that its owner froze -------------------------------------------------------------------


@pytest.mark.parametrize("project", ["gradient", "step"])
@pytest.mark.parametrize("make", [mlp, cnn])
def test_gpm_protects_the_outputs_of_layers_with_a_frozen_bias(make, project):
    options = {"shape": IMAGE} if make is cnn else {}
    stream = make_stream(**options)
    model = make(bias=True)
    found = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    frozen = found[: len(found) // 2]
    for module in frozen:
        nn.init.normal_(module.bias)
        module.bias.requires_grad_(False)
    learner = make_learner(stream, model)
    gpm = GPM(0.9, samples=40, rank_rule="energy", project=project)
    maps = {layer.name: layer for layer in learner.layers(Protect())}
    assert not any(layer.augmented for layer in maps.values() if layer.module in frozen)
    assert any(layer.augmented for layer in maps.values())
    learn(learner, gpm, stream[0])
    before, memory = weights(learner), dict(gpm.memory)
    learn(learner, gpm, stream[1])
    after = weights(learner)
    moved = 0
    for name, layer in maps.items():
        if layer.module not in frozen:
            continue
        path = name.split("#")[0]
        assert torch.equal(after[f"{path}.bias"], before[f"{path}.bias"])
        change = layer.matrix(after[f"{path}.weight"] - before[f"{path}.weight"], None)
        M = memory[name].to(change)
        assert (change @ M).norm() < 1e-4 * max(change.norm(), 1e-3)
        moved += change.norm() > 1e-3
    assert moved


class FreezesABias(Finetune):
    def setup(self, learner, task):
        if task.index:
            learner.backbone.fc2.bias.requires_grad_(False)


def test_a_bias_frozen_behind_gpms_back_is_refused():
    stream = make_stream()
    learner = with_bias(stream)
    both = Together({"gpm": GPM(0.9, samples=40), "other": FreezesABias()})
    learn(learner, both, stream[0])
    with pytest.raises(ValueError, match=r"bias of layer 'backbone.fc2' was frozen.*protect.bias"):
        learn(learner, both, stream[1])


def test_memories_of_another_width_are_refused():
    stream = make_stream()
    learner = with_bias(stream)
    gpm = GPM(0.9, samples=40)
    learn(learner, gpm, stream[0])
    learner.backbone.fc1.bias.requires_grad_(False)
    learner.remember_initial_state()
    with pytest.raises(ValueError, match=r"'backbone.fc1' remembers inputs of 13 .* has 12 now"):
        learner.begin(stream[1], gpm)
