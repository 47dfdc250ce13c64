"""Float32 weights that optimizers step, while passes see them in half precision."""

import functools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from chats import said, saved, write
from texts import make_learner as make_text_learner
from texts import make_stream as make_texts
from torch import nn
from torch.optim import SGD, Adam, AdamW
from toys import make_engine, make_learner, make_stream, mlp, weights

from cl_bench import run
from cl_bench.contracts import UsageError
from cl_bench.learners.guards import rounded_to
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.strategies.svd.adaptive_svd import AdaptiveSVD
from cl_bench.tasks.chat import Chat

HALF = torch.bfloat16


class RoundedLinear(nn.Linear):
    """What the text says: a float32 weight, rounded in every forward pass."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(HALF)
        return F.linear(x.to(HALF), self.weight.to(HALF), bias)


def learner_of(kind, stream, optimizer):
    learner = make_learner(stream, mlp(bias=True), optimizer)
    if kind == "masters":
        learner.keep_masters(HALF)
    elif kind == "half":
        learner.to(HALF)
        learner.remember_initial_state()
        for task in stream:
            task.data.tensors["x"] = task.data.tensors["x"].to(HALF)
    else:
        for module in learner.modules():
            if type(module) is nn.Linear:
                module.__class__ = RoundedLinear
        for task in stream:  # what the first layer reads is rounded too
            task.data.tensors["x"] = task.data.tensors["x"].to(HALF).float()
    return learner


def two_tasks(kind, make, optimizer, **options):
    """Weights after each of two tasks, and the strategy."""
    stream, strategy = make_stream(tasks=2), make()
    learner = learner_of(kind, stream, optimizer)
    engine = make_engine(learner, strategy, epochs=5, **options)
    found = []
    for i, task in enumerate(stream):
        engine.learn(task, strategy.plan(stream, i))
        found.append(weights(learner))
        if i == 0:
            bases = dict(getattr(strategy, "memory", {}))
    return learner, found, bases


CASES = {
    "gpm": (
        functools.partial(GPM, samples=20, project="gradient"),
        functools.partial(SGD, lr=0.05),
        {},
    ),
    "gpm-adam": (functools.partial(GPM, samples=20), functools.partial(Adam, lr=1e-3), {}),
    "gpm-fused-clipped": (
        functools.partial(GPM, samples=20),
        functools.partial(AdamW, lr=1e-3, fused=True),
        {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2},
    ),
    "adaptive_svd": (AdaptiveSVD, functools.partial(AdamW, lr=1e-3), {"gradient_clip_val": 0.5}),
    "adaptive_svd-dense": (
        functools.partial(AdaptiveSVD, parametrisation="dense_projected"),
        functools.partial(AdamW, lr=1e-3),
        {},
    ),
    "adaptive_svd-factored": (
        functools.partial(AdaptiveSVD, parametrisation="factored"),
        functools.partial(SGD, lr=0.01),
        {},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_that_of_float32_weights_rounded_in_every_pass(name):
    make, optimizer, options = CASES[name]
    learner, found, _ = two_tasks("masters", make, optimizer, **options)
    _, wanted, _ = two_tasks("by hand", make, optimizer, **options)
    for ours, theirs in zip(found, wanted, strict=True):
        for key, weight in ours.items():
            assert weight.dtype == torch.float32
            assert torch.equal(weight, theirs[key]), key
    assert not torch.equal(found[0]["backbone.fc1.weight"], found[1]["backbone.fc1.weight"])
    assert learner(make_stream()[0].everything).dtype == HALF


def leak(found, bases):
    """The largest share of a layer's change that lies where old inputs are."""
    shares = []
    for name, M in bases.items():
        change = found[1][f"{name}.weight"].double() - found[0][f"{name}.weight"].double()
        if len(M) > change.shape[1]:  # with a bias the last input is the constant 1
            bias = found[1][f"{name}.bias"].double() - found[0][f"{name}.bias"].double()
            change = torch.cat([change, bias[:, None]], dim=1)
        if change.any():
            shares.append(float((change @ M.to(change)).norm() / change.norm()))
    return max(shares)


def test_old_outputs_stay_where_half_precision_moves_them():
    make, optimizer, _ = CASES["gpm-adam"]
    assert leak(*two_tasks("masters", make, optimizer)[1:]) < 1e-5
    assert leak(*two_tasks("half", make, optimizer)[1:]) > 1e-2


@pytest.mark.parametrize(("kind", "moves"), [("masters", True), ("half", False)])
def test_small_steps_add_up_in_masters_alone(kind, moves):
    make, optimizer = CASES["gpm-adam"][0], functools.partial(SGD, lr=1e-5)
    _, found, _ = two_tasks(kind, make, optimizer)
    first = learner_of(kind, make_stream(tasks=2), optimizer).backbone.fc1.weight
    changed = (found[0]["backbone.fc1.weight"] != first).float().mean()
    assert changed > 0.9 if moves else changed < 0.1


def test_services_see_what_passes_see_and_leave_masters():
    stream = make_stream(tasks=2)
    ours = learner_of("masters", stream, functools.partial(SGD, lr=0.1))
    theirs = learner_of("by hand", stream, functools.partial(SGD, lr=0.1))
    batch = stream[0].everything
    for learner in (ours, theirs):
        learner.begin(stream[0], Finetune())
    teacher = ours.snapshot()
    for ask in (
        lambda learner: learner(batch),
        lambda learner: learner.features(batch),
        lambda learner: learner.readout(learner.features(batch)),
    ):
        assert torch.equal(ask(ours), ask(theirs))
    assert torch.equal(teacher(batch), theirs(batch))
    for options in ({}, {"per_sample": True}):
        found, wanted = ours.gradients(batch, **options), theirs.gradients(batch, **options)
        for name, gradient in found.items():
            assert gradient.dtype == torch.float32
            torch.testing.assert_close(gradient, wanted[name], rtol=0.02, atol=1e-3)
    assert all(type(p) is nn.Parameter and p.dtype == torch.float32 for p in ours.parameters())


# T5's cross-attention takes another kernel where activations are recomputed.
@pytest.mark.parametrize(("family", "share"), [("llama", 0), ("t5", 0.1)])
def test_recomputed_activations_and_tied_weights(family, share):
    found = []
    for thrifty in (False, True):
        torch.manual_seed(0)
        stream = make_texts()
        learner = make_text_learner(
            family, stream, tied=True, gradient_checkpointing=thrifty
        ).float()
        learner.keep_masters(HALF)
        learner.begin(stream[0], Finetune())
        learner.train()
        loss = learner.training_step(stream[0].train[torch.arange(3)], 0)
        loss.backward()
        found.append({n: p.grad for n, p in learner.named_parameters()})
        assert learner.answers(stream[0].train[torch.arange(2)])
    for name, gradient in found[0].items():
        assert gradient.dtype == torch.float32
        assert (found[1][name] - gradient).norm() <= share * gradient.norm(), name


def test_masters_are_the_default_where_steps_are_guarded(tmp_path, capsys, no_pictures):
    rows = [said("hi", "yo"), said("a longer question", "no")] * 4
    stream = Chat([write(tmp_path / "rows.jsonl", rows)], tokenizer=str(saved("llama")))
    words = [
        *("learner=language", "model=hub", f"model.name_or_path={saved('llama')}"),
        *("model.dtype=bfloat16", "optimizer=adamw", "trainer.accelerator=cpu", "pack=1"),
        *("trainer.max_epochs=1", "batch_size=4", "logger.mode=disabled"),
        *("alignment.enabled=false",),
    ]
    kinds = {}
    for name in ("gpm", "finetune"):
        result = run(stream, name, overrides=words, run_dir=tmp_path / name)
        kinds[name] = {p.dtype for p in result.learner.parameters()}
        assert ("float32 masters, rounded to bfloat16" in capsys.readouterr().out) == (
            name == "gpm"
        )
    assert kinds == {"gpm": {torch.float32}, "finetune": {HALF}}
    with pytest.raises(UsageError, match=r"cannot guard weights in half precision"):
        run(stream, "gpm", overrides=[*words, "trainer.masters=false"], run_dir=tmp_path / "no")
    with pytest.raises(UsageError, match=r"trainer\.masters=some: use auto, true or false"):
        run(stream, "gpm", overrides=[*words, "trainer.masters=some"], run_dir=tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_who_asks_for_masters_gets_them_or_is_told():
    learner = make_learner(make_stream(), mlp())
    assert rounded_to("auto", GPM(), learner, "32-true") is None
    assert rounded_to("auto", Finetune(), learner, "bf16-true") is None
    assert rounded_to(True, Finetune(), learner, "bf16-true") == HALF
    assert rounded_to("auto", GPM(), learner, "16-true") == torch.float16
    with pytest.raises(UsageError, match=r"trainer\.masters=true: has no effect"):
        rounded_to(True, GPM(), learner, "bf16-mixed")
