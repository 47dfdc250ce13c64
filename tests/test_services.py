"""What strategies may ask of a learner beside its geometry: features, teachers, roles, moments."""

import copy
import io

import pytest
import texts
import torch
from toys import CLASSES, DIM, learn, make_learner, make_stream, mlp

from cl_bench.contracts import Strategy, UsageError
from cl_bench.strategies.finetune import Finetune
from cl_bench.strategies.gpm import GPM
from cl_bench.subspace import ConfinedLinear, confinement

WORDS = ("t5", "gpt2", "gpt_neox")
KINDS = ("domain", "task", "class", *WORDS)


def begun(kind, t=1, **options):
    """A stream and a learner that has met its first ``t`` + 1 tasks, and a batch of the last."""
    if kind in WORDS:
        stream = texts.make_stream()
        learner = texts.make_learner(kind, stream, **options)
    else:
        stream = make_stream(kind)
        learner = make_learner(stream, **options)
    for task in stream[: t + 1]:
        learner.begin(task, Finetune())
    return stream, learner.eval(), whole(stream[t])


def whole(task):
    return task.train[torch.arange(len(task.train))]


# -- features and heads ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_readout_of_features_is_the_forward_pass(kind):
    _, learner, batch = begun(kind)
    out, features = learner(batch), learner.features(batch)
    found = learner.readout(features)
    known = out != -torch.inf  # without the task, nothing is left out
    assert bool(known.all()) == (kind != "task")
    assert torch.equal(found[known], out[known])
    assert features.shape[:-1] == out.shape[:-1]
    assert features.requires_grad
    with torch.no_grad():
        assert not learner.features(batch).requires_grad
    loss = learner.loss(learner.readout(features).where(known, out.detach()), batch)
    wanted = torch.autograd.grad(learner.loss(out, batch), learner.trainable_parameters())
    given = torch.autograd.grad(loss, learner.trainable_parameters())
    assert all(torch.equal(a, b) for a, b in zip(given, wanted, strict=True))


def test_features_follow_the_networks_mode():
    _, learner, batch = begun("domain", model=torch.nn.Sequential(mlp(), torch.nn.Dropout(0.5)))
    assert torch.equal(learner.features(batch), learner.features(batch))
    learner.train()
    assert not torch.equal(learner.features(batch), learner.features(batch))


def test_heads_are_chosen():
    _, learner, batch = begun("class")
    features = learner.features(batch)
    own = [head(features) for head in learner.heads]
    assert torch.equal(learner.readout(features, "current"), own[1])
    assert torch.equal(learner.readout(features, "seen"), torch.cat(own[:2], 1))
    assert torch.equal(learner.readout(features, "all"), torch.cat(own, 1))
    assert torch.equal(learner.readout(features, 2), own[2])
    for wrong in (3, -1, "first"):
        with pytest.raises(UsageError, match=r"heads=.*a number from 0 to 2"):
            learner.readout(features, wrong)


def test_a_language_model_has_one_head():
    _, learner, batch = begun("gpt2")
    features = learner.features(batch)
    for heads in ("current", "seen", "all", 0):
        assert torch.equal(learner.readout(features, heads), learner(batch))
    learner.config.logit_scale = 0.5
    with pytest.raises(UsageError, match=r"logit_scale=0\.5"):
        learner.readout(features)


@pytest.mark.parametrize("kind", ["domain", "gpt2"])
def test_bare_features_are_those_without_adapters(kind):
    peft = pytest.importorskip("peft")
    _, learner, batch = begun(kind)
    wanted = learner.features(batch)
    targets = ["fc1"] if kind == "domain" else ["c_attn"]
    config = peft.LoraConfig(
        r=2, target_modules=targets, init_lora_weights=False, fan_in_fan_out=kind == "gpt2"
    )
    tuner = peft.LoraModel(learner.network, config, "one")
    learner.eval()
    trains = {name: p.requires_grad for name, p in learner.named_parameters()}
    adapted = learner.features(batch)
    assert not torch.equal(adapted, wanted)
    assert torch.equal(learner.features(batch, bare=True), wanted)
    assert torch.equal(learner.features(batch), adapted)
    assert {name: p.requires_grad for name, p in learner.named_parameters()} == trains
    tuner.merge_adapter()
    with pytest.raises(UsageError, match="unmerge it"):
        learner.features(batch, bare=True)


# -- snapshots -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_snapshot_stays_what_the_network_was(kind):
    stream, learner, batch = begun(kind)
    twin, seen = copy.deepcopy(learner), learner.seen_heads
    twin.eval()
    held, parameters = set(learner.state_dict()), list(learner.parameters())
    with torch.no_grad():
        before, features = twin(batch), twin.features(batch)
    teacher = learner.snapshot()
    learn(learner, Finetune(), stream[-1], epochs=1)
    learner.eval()
    assert not torch.equal(learner(batch), twin(batch))
    assert torch.equal(teacher(batch), before)
    assert torch.equal(teacher.features(batch), features)
    assert not teacher(batch).requires_grad
    assert set(learner.state_dict()) == held
    assert [id(p) for p in learner.parameters()] == [id(p) for p in parameters]
    if kind in ("task", "class"):
        assert learner.seen_heads > seen  # heads met since are not the snapshot's
        assert teacher.readout(teacher.features(batch)).shape[1] == seen * CLASSES
        assert torch.equal(teacher(batch, head=0), twin(batch, head=0))


def test_a_snapshot_holds_the_network_and_nothing_else():
    _, learner, batch = begun("domain")
    learner.strategy, watched = GPM(0.9), []
    learner.strategy.memory = {"much": torch.zeros(1_000_000)}
    learner.backbone.register_forward_hook(lambda *_: watched.append("passed"))
    teacher = learner.snapshot()
    teacher(batch)
    assert not watched, "a hook came along"
    assert type(teacher._copy.strategy) is Strategy
    file = io.BytesIO()
    torch.save(teacher._copy.__dict__, file)  # whatever it holds, by value
    weights = sum(value.nbytes for value in learner.state_dict().values())
    assert file.tell() < 2 * weights + 40_000


def test_a_snapshot_of_a_confined_network_is_of_the_plain_one(monkeypatch):
    monkeypatch.setattr(confinement, "WORTHWHILE", -1e9)
    stream, learner, batch = begun("domain", model=mlp(bias=False))
    gpm = GPM(0.8, samples=40)
    learn(learner, gpm, stream[0], epochs=1)
    learner.begin(stream[1], gpm)
    assert type(learner.backbone.fc1) is ConfinedLinear
    teacher = learner.snapshot()
    assert type(teacher._copy.backbone.fc1) is torch.nn.Linear
    assert torch.equal(teacher(batch), learner.eval()(batch))
    assert type(learner.backbone.fc1) is ConfinedLinear


def test_a_snapshot_follows_the_learner_and_counts():
    _, learner, batch = begun("domain")
    teacher = learner.snapshot()
    learner.double()
    passes = learner.work.forward_samples
    assert teacher({**batch, "x": batch["x"].double()}).dtype == torch.float64
    learner.to("meta")
    assert teacher.features(batch).is_meta
    assert learner.work.forward_samples == passes + 2 * len(batch["y"])


def test_a_snapshot_keeps_weights_that_torch_computes():
    model = torch.nn.Sequential(torch.nn.utils.spectral_norm(torch.nn.Linear(DIM, 8)))
    _, learner, batch = begun("domain", model=model)
    assert torch.equal(learner.snapshot()(batch), learner(batch))
