"""What strategies may ask of a learner beside its geometry: features, teachers, roles, moments."""

import copy
import functools
import io
from collections import Counter

import dying
import pytest
import texts
import torch
from torch.optim import Adadelta, Adagrad, AdamW, NAdam, RAdam, RMSprop
from toys import CLASSES, DIM, learn, make_engine, make_learner, make_stream, mlp

from cl_bench.contracts import EpochDecision, Plan, Strategy, UsageError
from cl_bench.integrations import Guarded
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.projection.gpm import GPM
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


class Distils(Strategy):
    """Stays near what the network said when the task began."""

    def setup(self, learner, task):
        self.teacher = learner.snapshot()

    def penalty(self, learner, batch, out):
        return (out - self.teacher(batch)).square().mean()


def test_a_teacher_made_in_setup_is_the_same_after_a_resume(tmp_path):
    dying.learn(tmp_path / "whole", Distils)
    dying.die(tmp_path / "killed", Distils, dies_at=23)
    dying.learn(tmp_path / "killed", Distils, resume=True)
    dying.same(tmp_path / "whole", tmp_path / "killed")


def test_a_snapshot_keeps_weights_that_torch_computes():
    model = torch.nn.Sequential(torch.nn.utils.spectral_norm(torch.nn.Linear(DIM, 8)))
    _, learner, batch = begun("domain", model=model)
    assert torch.equal(learner.snapshot()(batch), learner(batch))


# -- weights, roles, moments -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["class", "gpt2"])
def test_weights_are_live_and_loading_copies(kind):
    stream, learner, batch = begun(kind)
    live, before = learner.weights(), {k: v.clone() for k, v in learner.weights().items()}
    out = learner(batch)
    learn(learner, Finetune(), stream[1], epochs=1)
    assert any(not torch.equal(live[name], before[name]) for name in before)
    learner.load_weights(before)
    assert all(torch.equal(live[name], before[name]) for name in before)
    assert torch.equal(learner.eval()(batch), out)
    learn(learner, Finetune(), stream[1], epochs=1)
    assert not torch.equal(learner.eval()(batch), out)
    learner.load_weights(before)
    assert torch.equal(learner.eval()(batch), out), "loading gave the caller's tensors away"


@pytest.mark.parametrize(
    ("kind", "tied", "wanted"),
    [  # two blocks each; T5's relative positions are two tables
        ("t5", True, {"matrix": 2 * 6 + 2 * 10, "vector": 2 * 2 + 2 * 3 + 2, "embedding": 3}),
        ("t5", False, {"matrix": 32, "vector": 12, "embedding": 3, "head": 1}),
        ("gpt2", True, {"matrix": 2 * 4, "vector": 2 * (4 + 4) + 2, "embedding": 2}),
        ("gpt_neox", False, {"matrix": 8, "vector": 18, "embedding": 1, "head": 1}),
    ],
)
def test_roles_of_language_models(kind, tied, wanted):
    _, learner, _ = begun(kind, tied=tied)
    found = learner.roles()
    assert list(found) == [name for name, _ in learner.named_parameters()]
    assert Counter(found.values()) == wanted
    shapes = {name: p.dim() for name, p in learner.named_parameters()}
    assert all((shapes[name] > 1) == (role != "vector") for name, role in found.items())


def test_roles_of_layers_that_are_no_linear_map():
    class Mixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.position = torch.nn.Parameter(torch.zeros(1, 3, 4))
            self.convolution = torch.nn.Conv1d(4, 4, 3, padding=1)
            self.norm = torch.nn.LayerNorm((3, 4))
            self.attention = torch.nn.MultiheadAttention(4, 2, batch_first=True)
            self.recurrent = torch.nn.GRU(4, 4, batch_first=True)

        def forward(self, x):
            x = self.norm(x.view(-1, 4, 3).transpose(1, 2)) + self.position
            x = self.convolution(x.transpose(1, 2)).transpose(1, 2)
            return self.recurrent(self.attention(x, x, x)[0])[0]

    _, learner, _ = begun("class", model=Mixed(), head_bias=True)
    found = learner.roles()
    assert list(found) == [name for name, _ in learner.named_parameters()]
    matrices = {name.removeprefix("backbone.") for name, r in found.items() if r == "matrix"}
    assert matrices == {
        "convolution.weight",
        *("attention.in_proj_weight", "attention.out_proj.weight"),
        *("recurrent.weight_ih_l0", "recurrent.weight_hh_l0"),
    }
    assert {name for name, role in found.items() if role == "head"} == {
        f"heads.{i}.{part}" for i in range(3) for part in ("weight", "bias")
    }


ADAPTIVE = {
    AdamW: "exp_avg_sq",
    NAdam: "exp_avg_sq",
    RAdam: "exp_avg_sq",
    RMSprop: "square_avg",
    Adadelta: "square_avg",
    Adagrad: "sum",
}


class Remembers(Strategy):
    """Asks for second moments at every hook where they should be there, and builds anew once."""

    def __init__(self):
        self.found, self.optimizers, self.last = {}, [], {}

    def after_step(self, learner, batch, out):
        self.found["step"] = learner.second_moments()

    def after_epoch(self, learner, task, progress):
        self.found["epoch"] = {k: v.clone() for k, v in learner.second_moments().items()}
        self.optimizers.append(learner._optimizing()[0])
        return EpochDecision(rebuild_optimizer=progress.epoch == 1)

    def collect(self, learner, task):
        self.found["collect"] = learner.second_moments()
        return {}

    def consolidate(self, learner, task, stats):
        self.found["consolidate"] = learner.second_moments()
        self.last = dict(self.optimizers[-1].state)  # nothing holds it when the task is over


@pytest.mark.parametrize("pack", [1, 4])
@pytest.mark.parametrize("kind", ADAPTIVE)
def test_second_moments_are_the_optimizers(kind, pack):
    stream = make_stream()
    learner = make_learner(stream, optimizer=functools.partial(kind, lr=0.01), pack=pack)
    strategy = Remembers()
    make_engine(learner, strategy, pack=pack).learn(stream[0], Plan(stream[0].train))
    first, last = strategy.optimizers
    assert last is not first
    assert not last.state
    names = dict(learner.named_parameters())
    assert strategy.found["consolidate"].keys() == strategy.found["step"].keys() == names.keys()
    for name, moment in strategy.found["consolidate"].items():
        assert moment is strategy.last[names[name]][ADAPTIVE[kind]]
        assert float(moment.sum()) > 0
        assert torch.equal(moment, strategy.found["epoch"][name])


def test_second_moments_need_an_optimizer_that_keeps_them():
    _, learner, batch = begun("domain")
    with pytest.raises(UsageError, match="none trains now"):
        learner.second_moments()
    optimizer = learner.configure_optimizers()
    learner.loss(learner(batch), batch).backward()
    optimizer.step()
    with pytest.raises(UsageError, match=r"SGD keeps no second moment .* optimizer=adam"):
        learner.second_moments()


def test_the_optimizer_is_in_no_copy_and_in_no_later_task():
    stream, learner, _ = begun("domain", optimizer=functools.partial(AdamW, lr=0.01))
    optimizer = learner.configure_optimizers()
    assert learner.second_moments() == {}
    assert learner.__getstate__()["_optimizer"] is None
    assert copy.deepcopy(learner)._optimizer is learner.snapshot()._copy._optimizer is None
    del optimizer
    assert learner._optimizing() == (), "the learner keeps the optimizer alive"
    optimizer = learner.configure_optimizers()
    learner.begin(stream[1], Finetune())
    with pytest.raises(UsageError, match="none trains now"):
        learner.second_moments()
    assert optimizer


def test_second_moments_in_somebody_elses_loop():
    model, asked = torch.nn.Linear(DIM, 3), []

    class Asks(Strategy):
        def collect(self, learner, task):
            asked.append({k: v.clone() for k, v in learner.second_moments().items()})
            asked.append(learner.roles())
            return {}

    optimizer = AdamW(model.parameters())
    guard = Guarded(model, Asks())
    x = torch.randn(8, DIM)
    with guard.task(optimizer, sample=x):
        model(x).sum().backward()
        optimizer.step()
    assert asked[1] == {"weight": "matrix", "bias": "vector"}
    for name, parameter in model.named_parameters():
        assert torch.equal(asked[0][name], optimizer.state[parameter]["exp_avg_sq"])
    assert not guard.learner.optimizers
