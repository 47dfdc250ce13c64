"""Freeze on language models: which blocks, shared embeddings, when it stops."""

import functools
from pathlib import Path

import pytest
import torch
from biographies import _Trainer, learn, make_causal, snapshot, world
from torch.optim import SGD, AdamW
from toys import Silent, make_stream, mlp

from cl_bench.contracts import Plan, UsageError
from cl_bench.experiment import LightningEngine, LoopSettings, Together
from cl_bench.learners import Causal, Classifier
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.isolation.freeze import Freeze
from cl_bench.strategies.replay.er import ER

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[3]
ARCHITECTURES = ("gpt_neox", "gpt2")


def test_blocks_are_found_however_deep_a_model_keeps_them():
    torch.manual_seed(1)
    config = transformers.OPTConfig(
        vocab_size=len(world().vocabulary),
        hidden_size=16,
        word_embed_proj_dim=16,
        num_hidden_layers=3,
        ffn_dim=32,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model = transformers.OPTForCausalLM(config)
    factory = functools.partial(AdamW, lr=1e-2)
    learner = Causal(world(), model, factory, batch_size=8, seed=0)
    assert learner.blocks() == list(model.model.decoder.layers)
    learner.begin(world()[1], Freeze(2, embeddings=False))
    frozen = {n for n, p in learner.named_parameters() if not p.requires_grad}
    assert frozen == {
        n for n, _ in learner.named_parameters() if ".layers.0." in n or ".layers.1." in n
    }


def frozen_names(learner):
    return {n for n, p in learner.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("depth", [12, 32])
def test_two_blocks_are_the_two_lowest_ones_however_many_there_are(architecture, depth):
    learner = make_causal(architecture, depth=depth)
    learner.begin(world()[1], Freeze(2))
    layers = "layers" if architecture == "gpt_neox" else "h"
    tables = ("embed_in",) if architecture == "gpt_neox" else ("wte", "wpe")
    wanted = tuple(f"backbone.{layers}.{i}." for i in (0, 1)) + tuple(
        f"backbone.{t}." for t in tables
    )
    assert frozen_names(learner) == {
        n for n, _ in learner.named_parameters() if n.startswith(wanted)
    }
    learner.begin(world()[0], Freeze(2))
    assert not frozen_names(learner)  # start_task=1 leaves task 0 alone
    learner.begin(world()[0], Freeze(2, start_task=0, embeddings=False))
    assert all(f".{layers}." in n for n in frozen_names(learner))
    assert frozen_names(learner)


@pytest.mark.parametrize(
    "optimizer",
    [
        functools.partial(AdamW, lr=1e-2, weight_decay=0.5),
        functools.partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    ],
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_frozen_weights_stay_bit_for_bit_and_have_no_optimizer_state(architecture, optimizer):
    stream, states = world(), []

    def remembering(groups):
        states.append(optimizer(groups))
        return states[-1]

    learner = make_causal(architecture, optimizer=remembering)
    strategy = Freeze(1)
    learn(learner, strategy, stream[:1])
    before = snapshot(learner)
    engine = LightningEngine(
        learner, strategy, _Trainer(), LoopSettings(0, 8), None, Silent(), Silent()
    )
    engine.learn(stream[1], Plan(stream[1].train))
    frozen = frozen_names(learner)
    assert frozen
    after = dict(learner.named_parameters())
    # The position table's rows beyond the longest text get no gradient, but they decay.
    for name, value in before.items():
        assert torch.equal(after[name], value) == (name in frozen), name
    held = {id(after[name]) for name in frozen}
    given = {id(p) for group in states[-1].param_groups for p in group["params"]}
    assert not held & given
    assert not held & {id(p) for p in states[-1].state}


def test_freezing_nothing_is_fine_tuning_bit_for_bit():
    one, two = make_causal(), make_causal()
    learn(one, Finetune(), world())
    learn(two, Freeze(0, embeddings=False), world())
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_with_all_blocks_frozen_hidden_states_stay_the_same():
    stream, learner = world(), make_causal(depth=2)
    strategy = Freeze(2)
    learn(learner, strategy, stream[:1])
    batch, seen = stream[0].sample(5, 0), []
    top = learner.blocks()[-1]

    def keep(module, args, out):
        seen.append(out[0] if isinstance(out, tuple) else out)

    with torch.no_grad():
        handle = top.register_forward_hook(keep)
        learner.eval()
        learner(batch)
        LightningEngine(
            learner, strategy, _Trainer(), LoopSettings(0, 8), None, Silent(), Silent()
        ).learn(stream[1], Plan(stream[1].train))
        seen = seen[:1]
        learner.eval()
        learner(batch)
        handle.remove()
    assert torch.equal(seen[0], seen[1])


def test_early_stop_comes_at_the_first_epoch_that_reaches_the_metric_and_never_later():
    class Learned(Classifier):
        scores = iter([0.2, 0.5, 0.98, 0.99, 1.0, 1.0])

        def performance(self, batch):
            asked.append(len(next(iter(batch.values()))))
            return next(self.scores)

    asked = []
    stream = make_stream(tasks=2)
    learner = Learned(stream, mlp(), functools.partial(SGD, lr=0.01), batch_size=8, seed=0)
    strategy = Freeze(1, early_stop=0.99, stop_samples=10)
    trainer = functools.partial(_Trainer().__call__, max_epochs=6)
    epochs = []

    class Heard(Silent):
        def epoch(self, *args, **fields):
            if fields:
                epochs.append((fields["task"], fields["epoch"]))

    engine = LightningEngine(
        learner, strategy, trainer, LoopSettings(0, 8), None, Heard(), Silent()
    )
    for t, task in enumerate(stream):
        engine.learn(task, strategy.plan(stream, t))
    assert [e for t, e in epochs if t == 0] == [1, 2, 3, 4, 5, 6]  # start_task leaves it alone
    assert [e for t, e in epochs if t == 1] == [1, 2, 3, 4]
    assert asked == [10] * 4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tied_embeddings_need_a_word_from_the_user(architecture):
    learner = make_causal(architecture, tied=True)
    with pytest.raises(UsageError, match=r"strategy\.tied=freeze"):
        learner.begin(world()[0], Freeze(1))
    learner.begin(world()[1], Freeze(1, tied="train"))
    head = learner.heads[0].weight
    assert head.requires_grad
    assert not next(learner.blocks()[0].parameters()).requires_grad
    learner.begin(world()[1], Freeze(1, tied="freeze"))
    assert not head.requires_grad
    assert frozen_names(learner) > frozen_names_of_blocks(learner, 1)
    learner.begin(world()[1], Together({"freeze": Freeze(1, tied="freeze"), "er": ER()}))
    assert not head.requires_grad  # a companion that trains heads does not thaw this one
    learner.begin(world()[1], Freeze(1, embeddings=False))
    assert head.requires_grad


def frozen_names_of_blocks(learner, n):
    inside = {id(p) for block in learner.blocks()[:n] for p in block.parameters()}
    return {name for name, p in learner.named_parameters() if id(p) in inside}


def test_freeze_of_networks_without_embeddings_is_by_blocks():
    stream = make_stream(tasks=2)
    learner = Classifier(stream, mlp(), functools.partial(SGD, lr=0.1), batch_size=8, seed=0)
    assert learner.embeddings() == []
    assert not learner.tied
    learner.begin(stream[1], Freeze(1))
    assert frozen_names(learner) == {"backbone.fc1.weight"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_blocks": -1}, "strategy.n_blocks=-1"),
        ({"tied": "loose"}, "strategy.tied=loose"),
        ({"early_stop": 1.5}, "strategy.early_stop=1.5"),
        ({"stop_samples": 0}, "strategy.stop_samples=0"),
    ],
)
def test_freeze_names_wrong_options(options, words):
    with pytest.raises(UsageError, match=words):
        Freeze(**options)


def test_trainable_share_of_pythia_160m():
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    conf = OmegaConf.load(ROOT / "conf/model/pythia_160m.yaml")
    with torch.device("meta"):
        model = instantiate(conf, vocabulary=50_304)
    everything = sum(p.numel() for p in model.parameters())
    frozen = sum(p.numel() for p in model.base_model.layers[:7].parameters())
    frozen += model.base_model.embed_in.weight.numel()
    assert 1 - frozen / everything == pytest.approx(0.456, abs=0.005)
