"""Adaptive SVD under optimizers and from task to task: what is kept stays, what is free learns."""

import copy

import pytest
import torch
from cores import OPTIMIZERS, half, make, touching
from dying import noisy
from torch import nn
from torch.optim import SGD
from toys import learn, learn_stream, make_engine, make_learner, make_stream, mlp, weights

from cl_bench.contracts import Plan, UsageError
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.svd.adaptive_svd import AdaptiveSVD
from cl_bench.subspace import CoreUpdate

PARAMETRISATIONS = ("projected_param", "dense_projected", "factored")


class Watched(AdaptiveSVD):
    """Keeps the splits of the task that it has just learned."""

    def consolidate(self, learner, task, stats):
        self.seen = dict(self.restricted.splits)
        super().consolidate(learner, task, stats)

    @property
    def changes(self):
        """``(name, split, D)`` of every matrix that was constrained."""
        return [(name, split, self.change[name]) for name, split in self.seen.items()]


class GradientOnly(Watched):
    """Negative control: what autograd hooks do."""

    def after_step(self, learner, batch, out):
        pass


# -- under optimizers -----------------------------------------------------------------------------


@pytest.mark.parametrize("parametrisation", PARAMETRISATIONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_change_touches_what_is_kept(parametrisation, optimizer):
    stream, learner = make(optimizer)
    strategy = Watched(**half(parametrisation=parametrisation, weight_decay=0.1))
    learn(learner, strategy, stream[0])
    start = weights(learner)
    learn(learner, strategy, stream[1], epochs=5)
    assert len(strategy.changes) == 3
    for name, split, D in strategy.changes:
        W = learner.get_parameter(f"{name}.weight").detach()
        assert torch.equal(D, W - start[f"{name}.weight"])
        assert D.norm() > 1e-3 * W.norm()
        assert max(touching(split, D)) < 1e-4
        # The triplets go on to be singular triplets of the new weight.
        k, scale = split.k, 1e-5 * float(W.norm())
        assert torch.allclose(W @ split.V_h, split.U_h * split.values[:k].float(), atol=scale)
        assert torch.allclose(
            split.U_h.t() @ W, (split.V_h * split.values[:k].float()).t(), atol=scale
        )
        # Two-sided changes have no more rank than what is left.
        r = min(W.shape)
        assert int(torch.linalg.matrix_rank(D, rtol=1e-4)) <= r - k


def test_gradients_alone_are_not_enough_under_adam():
    stream, learner = make("adam")
    strategy = GradientOnly(**half(parametrisation="dense_projected"))
    learn(learner, strategy, stream[0])
    learn(learner, strategy, stream[1], epochs=5)
    for _, split, D in strategy.changes:
        assert max(touching(split, D)) > 1e-2


@pytest.mark.parametrize("parametrisation", PARAMETRISATIONS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_clipping_accumulation_and_mixed_precision_keep_it_too(parametrisation, precision):
    stream, learner = make("adamw")
    strategy = Watched(**half(parametrisation=parametrisation))
    engine = make_engine(
        learner,
        strategy,
        accumulate_grad_batches=2,
        gradient_clip_val=0.1,
        precision=precision,
    )
    for task in stream[:2]:
        engine.learn(task, Plan(task.train))
    for _, split, D in strategy.changes:
        assert D.norm() > 1e-3
        assert max(touching(split, D)) < 1e-4


def test_weights_in_half_precision_are_made_from_cores_in_full():
    class Last(Watched):
        def consolidate(self, learner, task, stats):
            super().consolidate(learner, task, stats)
            self.made = {
                n: u.restriction.expand(u.B.detach(), u.start)
                for n, u in self.restricted.updates.items()
            }

    stream, learner = make("adam")
    strategy = Last(**half())
    engine = make_engine(learner, strategy, precision="bf16-true")
    for task in stream[:2]:
        engine.learn(task, Plan(task.train))
    assert len(strategy.made) == 3
    for name, made in strategy.made.items():
        weight = learner.get_parameter(f"{name}.weight").detach()
        assert weight.dtype == torch.bfloat16
        assert made.dtype == torch.float32
        assert torch.equal(weight, made.bfloat16())
    strategy = AdaptiveSVD(**half(parametrisation="dense_projected", start_task=0))
    with pytest.raises(UsageError, match=r"strategy.parametrisation=projected_param"):
        opened(learner, strategy, stream[2])


@pytest.mark.parametrize("parametrisation", PARAMETRISATIONS)
def test_packs_of_batches_learn_the_same(parametrisation):
    found = []
    for pack in (1, 2):
        stream = make_stream()
        learner = make_learner(stream, mlp(), OPTIMIZERS["adam"], pack=pack)
        engine = make_engine(
            learner, AdaptiveSVD(**half(parametrisation=parametrisation)), pack=pack
        )
        for task in stream[:2]:
            engine.learn(task, Plan(task.train))
        found.append(weights(learner))
    for name, weight in found[0].items():
        assert torch.allclose(weight, found[1][name], atol=1e-6)


def opened(learner, strategy, task):
    """The task's optimizer, before its first step."""
    learner.begin(task, strategy)
    return learner.configure_optimizers()


def test_scaled_losses_are_unscaled_before_they_reach_the_core():
    cores = []
    for scale in (None, 1024.0):
        stream, learner = make("sgd")
        strategy = AdaptiveSVD(**half(start_task=0))
        optimizer = opened(learner, strategy, stream[0])
        loss = learner.training_step(stream[0].everything, 0)
        if scale is None:
            loss.backward()
            strategy.constrain(learner)
        else:
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            strategy.constrain(learner)
            scaler.step(optimizer)
            assert float(scaler.get_scale()) == scale
        cores.append({name: u.B.grad.clone() for name, u in strategy.restricted.updates.items()})
    for name, core in cores[0].items():
        assert torch.allclose(core, cores[1][name], rtol=1e-4, atol=1e-8)


def test_accumulated_gradients_are_mapped_and_weights_made_once_a_step(monkeypatch):
    calls = []
    for method in ("pull_back", "push_forward"):
        original = getattr(CoreUpdate, method)
        monkeypatch.setattr(
            CoreUpdate, method, lambda self, o=original, m=method: (calls.append(m), o(self))
        )
    stream, learner = make("adam")
    engine = make_engine(
        learner, AdaptiveSVD(**half(start_task=0)), epochs=1, accumulate_grad_batches=4
    )
    engine.learn(stream[0], Plan(stream[0].train))  # four batches of ten: one step
    assert calls == ["pull_back"] * 3 + ["push_forward"] * 3


def test_what_goes_into_kept_directions_comes_out_as_before():
    stream, learner = make("adam", bias=True)
    strategy = Watched(**half(train_rest="none"))
    learn(learner, strategy, stream[0])
    before = copy.deepcopy(learner)
    learn(learner, strategy, stream[1])
    for name, split, _ in strategy.changes:
        old, new = before.get_submodule(name), learner.get_submodule(name)
        inside = torch.randn(10, split.k) @ split.V_h.t()
        anything = torch.randn(10, len(split.V_h))
        assert torch.allclose(new(inside), old(inside), atol=1e-4)
        assert torch.allclose(new(anything) @ split.U_h, old(anything) @ split.U_h, atol=1e-4)
        assert not torch.allclose(new(anything), old(anything), atol=1e-3)


@pytest.mark.parametrize("parametrisation", PARAMETRISATIONS)
@pytest.mark.parametrize("kind", ["left", "right", "block"])
def test_the_other_projections_keep_what_they_say_and_no_more(parametrisation, kind):
    if (parametrisation, kind) == ("factored", "block"):
        pytest.skip("refused: see the wrong options")
    stream, learner = make("adam")
    strategy = Watched(**half(parametrisation=parametrisation, projection=kind))
    learn(learner, strategy, stream[0])
    learn(learner, strategy, stream[1])
    for _, split, D in strategy.changes:
        left, right = touching(split, D)
        both = float((split.U_h.t() @ D @ split.V_h).norm() / D.norm())
        assert both < 1e-4
        assert (left < 1e-4) == (kind == "left")
        assert (right < 1e-4) == (kind == "right")
        assert max(left, right) > 1e-2


def test_with_nothing_preserved_it_is_fine_tuning_bit_for_bit():
    found = []
    for strategy in (Finetune(), AdaptiveSVD(schedule="fixed", preserve_ratio=0.0)):
        stream, learner = make("adamw")
        learn_stream(learner, strategy, stream)
        found.append(weights(learner))
    assert all(torch.equal(w, found[1][name]) for name, w in found[0].items())


@pytest.mark.parametrize("parametrisation", PARAMETRISATIONS)
def test_with_everything_preserved_nothing_moves(parametrisation):
    stream, learner = make("adamw")
    strategy = Watched(
        schedule="fixed", preserve_ratio=1.0, start_task=0, parametrisation=parametrisation
    )
    start = weights(learner)
    learn(learner, strategy, stream[0])
    for name, weight in weights(learner).items():
        assert torch.equal(weight, start[name]) == name.startswith("backbone.")


def test_with_nothing_to_train_the_run_does_not_start():
    stream, learner = make("adamw")
    strategy = AdaptiveSVD(schedule="fixed", preserve_ratio=1.0, start_task=0, train_rest="none")
    with pytest.raises(UsageError, match="preserve less"):
        opened(learner, strategy, stream[0])


# -- from task to task ----------------------------------------------------------------------------


def carries_over(learn_next, trained):
    """Whether the weight that the next task starts from is the trained one."""
    return torch.equal(learn_next, trained)


@pytest.mark.parametrize("parametrisation", PARAMETRISATIONS)
def test_the_next_task_starts_from_what_was_trained(parametrisation):
    stream, learner = make("adam")
    keys = {name: p.shape for name, p in learner.state_dict().items()}
    strategy = AdaptiveSVD(**half(parametrisation=parametrisation))
    learn(learner, strategy, stream[0])
    before = weights(learner)
    learn(learner, strategy, stream[1])
    trained = weights(learner)
    assert not torch.equal(before["backbone.fc1.weight"], trained["backbone.fc1.weight"])
    optimizer = opened(learner, strategy, stream[2])
    for layer in strategy.layers:
        assert carries_over(strategy.start[layer.name], trained[f"{layer.name}.weight"])
        assert carries_over(layer.weight.detach(), trained[f"{layer.name}.weight"])
    assert not optimizer.state
    assert {name: p.shape for name, p in learner.state_dict().items()} == keys
    assert all(type(m) is nn.Linear for m in learner.backbone if hasattr(m, "weight"))


def test_the_documented_task_switch_of_peft_is_seen_to_discard_the_training():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    start = model[0].weight.detach().clone()
    config = peft.OSFConfig(target_modules=["0"], effective_rank=4)

    def trained():
        wrapped = peft.get_peft_model(copy.deepcopy(model), config)
        optimizer = SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
        wrapped(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()
        probe = torch.eye(8)
        return wrapped, wrapped(probe).detach().t()

    wrapped, weight = trained()
    assert not torch.allclose(weight, start, atol=1e-5)
    unloaded = wrapped.unload()[0].weight.detach()
    assert not torch.allclose(unloaded, weight, atol=1e-5)
    assert torch.allclose(unloaded, start)  # all that was learned is gone
    wrapped, weight = trained()
    assert torch.allclose(wrapped.merge_and_unload()[0].weight.detach(), weight, atol=1e-5)


def test_how_much_of_the_last_update_is_unprotected_and_whether_the_kept_still_lead():
    stream, learner = make("adam")
    strategy = Watched(**half())
    learn(learner, strategy, stream[0])
    learn(learner, strategy, stream[1])
    D = dict(strategy.change)
    W = {layer: learner.get_parameter(f"{layer}.weight").detach().clone() for layer in D}
    learn(learner, strategy, stream[2], epochs=1)
    for name, split, _ in strategy.changes:
        k = split.k
        U, S, Vt = torch.linalg.svd(W[name].double())
        inside = U[:, k:].t() @ D[name].double() @ Vt[k:].t()
        measured = strategy.metrics()[name]
        assert measured["unprotected"] == pytest.approx(
            float(inside.norm() / D[name].norm()), rel=1e-3
        )
        now = learner.get_parameter(f"{name}.weight").detach().double()
        left = now - split.U_h.double() @ (split.U_h.t().double() @ now)
        expected = torch.linalg.svdvals(left)[0] / S[k - 1]
        assert measured["low_over_kept"] == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("rest", ["none", "norms", "all"])
def test_what_else_learns(rest):
    stream = make_stream("task")
    learner = make_learner(stream, noisy(), OPTIMIZERS["adam"])
    strategy = AdaptiveSVD(**half(train_rest=rest))
    learn(learner, strategy, stream[0])
    start = {k: v.clone() for k, v in learner.state_dict().items()}
    learn(learner, strategy, stream[1])
    moved = {k for k, v in learner.state_dict().items() if not torch.equal(v, start[k])}
    matrices = {"backbone.0.weight", "backbone.4.weight", "heads.1.weight"}
    norms = {f"backbone.1.{k}" for k in ("weight", "bias", "running_mean", "running_var")}
    norms |= {"backbone.1.num_batches_tracked"}
    expected = {"none": matrices, "norms": matrices | norms}
    # Under a normalisation a bias has no gradient to speak of; whether rounding moves it is open.
    found = moved - {"backbone.0.bias"} if rest == "all" else moved
    assert found == expected.get(rest, matrices | norms | {"backbone.4.bias"})


def test_convolutions_are_matrices_too():
    from toys import IMAGE, cnn

    stream = make_stream(shape=IMAGE, subspace=None)
    learner = make_learner(stream, cnn(), OPTIMIZERS["adam"])
    strategy = Watched(**half())
    learn(learner, strategy, stream[0])
    learn(learner, strategy, stream[1])
    # All but the grouped one, which belongs to the rest.
    assert sorted(strategy.seen) == ["backbone.0", "backbone.4", "backbone.7"]
    for _, split, D in strategy.changes:
        assert D.norm() > 1e-3
        assert max(touching(split, D)) < 1e-4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schedule": "plateau"}, "strategy.schedule=plateau"),
        ({"projection": "none"}, "strategy.projection=none"),
        ({"parametrisation": "svd"}, "strategy.parametrisation=svd"),
        ({"train_rest": "some"}, "strategy.train_rest=some"),
        ({"parametrisation": "factored", "projection": "block"}, "strategy.projection=block"),
        ({"preserve_ratio": 1.2}, "strategy.preserve_ratio=1.2"),
        ({"snap": -0.1}, "strategy.snap=-0.1"),
        ({"mrr": 0.9, "trr": 0.5}, "strategy.mrr=0.9, strategy.trr=0.5"),
        ({"schedule": "budget"}, "strategy.tasks=null"),
        ({"samples": 0}, "strategy.samples=0"),
    ],
)
def test_wrong_options_are_named(options, words):
    with pytest.raises(UsageError, match=words):
        AdaptiveSVD(**options)
