"""Gradients as training takes them: dropout and batch statistics on, and nothing left behind."""

import copy
import functools

import pytest
import texts
import torch
from torch.optim import AdamW
from toys import DIM, make_learner, make_stream

from cl_bench.integrations.borrowed import Borrowed
from cl_bench.learners import language
from cl_bench.models import gpt, t5
from cl_bench.strategies.baselines.finetune import Finetune


def begun(kind, model):
    """A learner that has met a task, and all its data."""
    stream = make_stream(kind)
    learner = make_learner(stream, model)
    for task in stream[:2]:
        learner.begin(task, Finetune())
    return learner, stream[1].everything


def noisy():
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Linear(DIM, 10),
        torch.nn.BatchNorm1d(10),
        torch.nn.Dropout(0.5),
        torch.nn.ReLU(),
        torch.nn.Linear(10, 8),
        torch.nn.BatchNorm1d(8),
    )


def taken(learner, batch, value):
    """Gradients by ``backward`` in a copy's own mode, with the random numbers of seed 3."""
    twin = copy.deepcopy(learner)
    torch.manual_seed(3)
    value(twin, twin(batch), batch).backward()
    return {name: p.grad for name, p in twin.named_parameters() if p.requires_grad}


def asked(learner, batch, **options):
    torch.manual_seed(3)
    return learner.gradients(batch, mode="train", **options)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["domain", "class"])
def test_gradients_of_training_mode_have_no_side_effects(kind, training):
    learner, batch = begun(kind, noisy())
    learner.train()
    learner.hold([learner.backbone[5]])  # goes by its statistics, in training too
    wanted = taken(learner, batch, lambda m, out, batch: m.loss(out, batch))
    learner.train(training)
    state = {k: v.clone() for k, v in learner.state_dict().items()}
    tensors, modes = [*learner.buffers()], [m.training for m in learner.modules()]
    found = asked(learner, batch)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not torch.equal(
        found["backbone.4.weight"], learner.gradients(batch)["backbone.4.weight"]
    )
    assert all(torch.equal(state[k], v) for k, v in learner.state_dict().items())
    assert all(a is b for a, b in zip(tensors, learner.buffers(), strict=True))
    assert [m.training for m in learner.modules()] == modes


def test_gradients_of_training_mode_leave_a_graph_whole():
    learner, batch = begun("domain", noisy())
    learner.train()
    loss = learner.loss(learner(batch), batch)
    learner.gradients(batch, mode="train")
    loss.backward()


def margin(out, batch):
    own = out.gather(1, batch["y"][:, None]).squeeze(1)
    return (out.logsumexp(1) - own).square().mean()


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_gradients_of_a_function_of_the_outputs(mode):
    learner, batch = begun("class", noisy())
    learner.train(mode == "train")
    wanted = taken(learner, batch, lambda m, out, batch: margin(out, batch))
    torch.manual_seed(3)
    found = learner.gradients(batch, margin, mode=mode)
    torch.manual_seed(3)
    single = learner.gradients(batch, margin, per_sample=True, mode=mode)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=0, rtol=0)
        assert len(single[name]) == len(batch["y"])
        torch.testing.assert_close(single[name].mean(0), gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_language_models_drop_in_training_mode(kind):
    stream = texts.make_stream()
    torch.manual_seed(1)
    make = {"t5": t5, "gpt2": functools.partial(gpt, architecture="gpt2", context=80)}[kind]
    model = make(len(stream.vocabulary), depth=1, width=16, heads=2, dropout=0.3)
    learner = language(stream, model, functools.partial(AdamW, lr=1e-3), 4, 0)
    batch = stream[0].train[torch.arange(9)]
    learner.train()
    wanted = taken(learner, batch, lambda m, out, batch: m.loss(out, batch))
    found = asked(learner.eval(), batch)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)
    assert len(asked(learner, batch, per_sample=True)[name]) == len(batch["labels"])


def test_somebody_elses_network_is_asked_in_training_mode_too():
    model = noisy()
    guard = Borrowed(model, torch.nn.functional.cross_entropy, None, 0)
    batch = {"x": torch.randn(9, DIM), "y": torch.arange(9) % 8}
    guard.open()
    model.eval()
    guard.hold([model[1]])
    guard.gradients(batch, mode="train")
    guard.end()
    assert not any(m.training for m in model.modules()), "the owner's choice of mode is lost"
