"""What strategies stand on: raw gradients without side effects, taps, heads, held layers."""

import copy
import functools
import warnings

import pytest
import torch
from noise import noisy
from torch import nn
from torch.optim import SGD
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
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.isolation.freeze import Freeze
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.strategies.replay.er import ER


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
