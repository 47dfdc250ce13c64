"""Causal language models: masks, scores, decoding, the services strategies stand on, freezing."""

import copy
import functools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import hydra
import pytest
import torch
from biographies import (
    _Trainer,
    batch_of,
    learn,
    make_causal,
    make_model,
    pretrained,
    snapshot,
    world,
)
from torch import nn
from torch.optim import SGD, AdamW
from toys import Silent, make_stream, mlp

from cl_bench.cli.run import run_config
from cl_bench.contracts import (
    IGNORE,
    LanguageStream,
    Origin,
    Plan,
    Pretraining,
    Protect,
    Task,
    UsageError,
)
from cl_bench.data import MemoryData
from cl_bench.experiment import LightningEngine, LoopSettings, Together, seed_training
from cl_bench.learners import Causal, Classifier
from cl_bench.models import gpt
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.baselines.joint import Joint
from cl_bench.strategies.isolation.freeze import Freeze
from cl_bench.strategies.merging.task_vector import TaskVector
from cl_bench.strategies.penalty.ewc import EWC
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.strategies.projection.rogo import ROGO
from cl_bench.strategies.replay.er import ER
from cl_bench.tracking import read_results

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("gpt_neox", "gpt2")


# -- masks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_changes_nothing(architecture):
    learner = make_causal(architecture).eval()
    batch = world()[0].sample(6, 0)
    filler = torch.full((6, 5), 3)
    longer = {
        "input_ids": torch.cat([batch["input_ids"], filler], 1),
        "labels": torch.cat([batch["labels"], torch.full_like(filler, IGNORE)], 1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.zeros_like(filler)], 1),
        "kind": batch["kind"],
    }
    other = {**batch, "input_ids": batch["input_ids"] + (1 - batch["attention_mask"]) * 7}
    reference = learner.loss(learner(batch), batch)
    for changed in (longer, other):
        out = learner(changed)
        assert torch.allclose(learner.loss(out, changed), reference, atol=1e-6)
        assert torch.equal(learner.score(out, changed), learner.score(learner(batch), batch))
        layers = learner.layers(Protect(bias="free"))
        one, two = (learner.tap(layers, [b]) for b in (batch, changed))
        for name in one:
            assert one[name].rows == two[name].rows == int(batch["attention_mask"].sum())
            assert torch.allclose(one[name].gram, two[name].gram, atol=1e-6)
            assert one[name].samples == 6


def test_loss_is_that_of_the_answer_tokens_alone():
    learner = make_causal().eval()
    batch = batch_of(world()[0].train, 0, 5)
    out = learner(batch)
    log_likelihood = out.log_softmax(2)
    total, count = 0.0, 0
    for i in range(2):
        for j in range(1, batch["labels"].shape[1]):
            if batch["labels"][i, j] != IGNORE:
                total -= float(log_likelihood.detach()[i, j - 1, batch["labels"][i, j]])
                count += 1
    assert count == int((batch["labels"] != IGNORE).sum())
    assert float(learner.loss(out, batch)) == pytest.approx(total / count, rel=1e-5)


def test_random_offsets_matter_in_training_only_and_only_where_positions_are_learned():
    batch = world()[0].sample(4, 0)
    for architecture, alike in (("gpt_neox", True), ("gpt2", False)):
        learner = make_causal(architecture)
        learner.random_offset = 30
        learner.eval()
        still = learner(batch)
        assert torch.equal(learner(batch), still)
        learner.train()
        torch.manual_seed(3)
        assert torch.allclose(learner(batch), still, atol=1e-4) == alike


# -- scores -----------------------------------------------------------------------------------


def logits_for(tokens, vocabulary):
    return nn.functional.one_hot(tokens, vocabulary).float() * 10


def oracle(batch, vocabulary):
    """Logits that predict every next token."""
    return logits_for(batch["input_ids"].roll(-1, 1), vocabulary)


def test_oracle_scores_one_and_a_wrong_token_anywhere_scores_zero():
    learner, stream = make_causal(), world()
    batch = stream[0].sample(9, 0)
    out = oracle(batch, len(stream.vocabulary))
    assert learner.score(out, batch).tolist() == [1.0] * 9
    details = learner.details(out, batch)
    assert details["first_token"].tolist() == details["type_rate"].tolist() == [1.0] * 9
    ends = (batch["labels"] != IGNORE).cumsum(1).argmax(1)
    trailing = out.clone()
    trailing[torch.arange(9), ends - 1] = logits_for(torch.tensor(5), out.shape[2])
    assert learner.score(trailing, batch).sum() == 0  # the answer goes on where it should end
    assert learner.details(trailing, batch)["first_token"].tolist() == [1.0] * 9


def test_details_by_kind_average_to_the_whole():
    learner, stream = make_causal(), world()
    batch = stream[0].sample(40, 0)
    out = torch.where(
        torch.rand(40, 1, 1) < 0.5,
        oracle(batch, len(stream.vocabulary)),
        torch.randn(*batch["input_ids"].shape, len(stream.vocabulary)),
    )
    details, exact = learner.details(out, batch), learner.score(out, batch)
    for kind, name in enumerate(stream.kinds):
        asked = batch["kind"] == kind
        assert details[f"exact_match/{name}"].nanmean() == exact[asked].mean()
        assert int(details[f"first_token/{name}"].isnan().sum()) == int((~asked).sum())
    assert (exact <= details["first_token"]).all()
    assert (details["first_token"] <= details["type_rate"]).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_score_says_what_greedy_decoding_does(architecture):
    """A model that has learned some answers: one forward pass agrees with generating them."""
    stream = world()
    learner = make_causal(architecture)
    batch = batch_of(stream[0].train, *range(24))
    optimizer = AdamW(learner.parameters(), lr=1e-2)
    for _ in range(25):
        optimizer.zero_grad()
        learner.loss(learner(batch), batch).backward()
        optimizer.step()
    learner.eval()
    score = learner.score(learner(batch), batch)
    assert 0 < float(score.mean()) < 1
    steps = int((batch["labels"] != IGNORE).sum(1).max())
    answers = learner.generate(batch, steps)
    for answer, labels, exact in zip(answers, batch["labels"], score, strict=True):
        wanted = stream.text(labels[labels != IGNORE])
        assert (stream.text(answer) == wanted) == bool(exact)


def test_decoding_does_not_depend_on_what_else_is_in_the_batch():
    learner = make_causal().eval()
    batch = batch_of(world()[0].train, *range(10))
    together = learner.generate(batch, 5)
    assert together.shape == (10, 5)
    for i in range(10):
        assert torch.equal(learner.generate(batch_of(world()[0].train, i), 5)[0], together[i])
    blank = {**batch, "labels": torch.full_like(batch["labels"], IGNORE)}
    assert learner.generate(blank, 3).shape == (10, 3)


def test_untrained_model_guesses_at_chance_at_best():
    learner, task = make_causal().eval(), world()[0]
    batch = task.train[torch.arange(len(task.train))]
    details = learner.details(learner(batch), batch)
    assert float(details["first_token"].mean()) < 0.25
    assert float(learner.score(learner(batch), batch).mean()) < 0.1


# -- services ---------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_per_sample_gradients_are_those_of_the_samples(architecture, tied):
    learner = make_causal(architecture, tied=tied)
    batch = world()[0].sample(3, 0)
    before = snapshot(learner)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        every = learner.gradients(batch, per_sample=True)
    for i in range(3):
        own = learner.gradients({k: v[i : i + 1] for k, v in batch.items()})
        for name in own:
            assert torch.allclose(every[name][i], own[name], atol=1e-6), name
    logits = learner.gradients(batch, of="logits", per_sample=True)
    assert all(g.shape[0] == 3 for g in logits.values())
    assert all(torch.equal(p, before[n]) for n, p in learner.named_parameters())
    assert all(p.grad is None for p in learner.parameters())
    assert learner.training


def test_drawn_labels_stand_where_labels_stood_and_follow_the_prediction():
    learner = make_causal().eval()
    batch = batch_of(world()[0].train, *[3] * 400)
    drawn = learner.draw_labels(batch, torch.Generator().manual_seed(0))
    assert torch.equal(drawn["labels"] == IGNORE, batch["labels"] == IGNORE)
    assert torch.equal(drawn["input_ids"], batch["input_ids"])
    where = int((batch["labels"][0] != IGNORE).int().argmax())
    share = torch.bincount(drawn["labels"][:, where], minlength=len(world().vocabulary)) / 400
    expected = learner(batch)[0, where - 1].softmax(0)
    assert float((share - expected).abs().max()) < 0.1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_blocks_embeddings_and_head_by_name(architecture):
    learner = make_causal(architecture, depth=3)
    names = [layer.name for layer in learner.layers(Protect())]
    assert len(names) == 3 * 4 + 1
    assert names[-1] == "heads.0"
    assert len(learner.blocks()) == 3
    assert len(learner.embeddings()) == (1 if architecture == "gpt_neox" else 2)
    assert not learner.tied
    assert make_causal(architecture, tied=True).tied
    without = learner.layers(Protect(heads="never"))
    assert "heads.0" not in [layer.name for layer in without]


@pytest.mark.parametrize(
    "strategy",
    [
        Finetune(),
        GPM(threshold=0.9, samples=16),
        EWC(samples=16),
        EWC(samples=16, fisher="empirical"),
        ER(memory=20),
        Joint(),
        ROGO(threshold=0.9, samples=16, relax_samples=16),
        TaskVector(0.5),
        Freeze(1),
        Together({"gpm": GPM(threshold=0.9, samples=16), "freeze": Freeze(1, early_stop=0.9)}),
    ],
    ids=[
        "finetune",
        "gpm",
        "ewc",
        "ewc_empirical",
        "er",
        "joint",
        "rogo",
        "task_vector",
        "freeze",
        "gpm+freeze",
    ],
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_strategies_run_unchanged(architecture, strategy):
    stream = world()
    learner = make_causal(architecture)
    before = snapshot(learner)
    learn(learner, copy.deepcopy(strategy), stream)
    after = snapshot(learner)
    assert any(not torch.equal(before[n], after[n]) for n in before)
    assert all(p.isfinite().all() for p in after.values())


def test_gpm_keeps_the_outputs_on_the_protected_tokens():
    """A threshold of 1 protects all inputs of every layer: old answers stay as they are."""
    stream = world()
    learner = make_causal("gpt2", optimizer=functools.partial(SGD, lr=0.1))
    strategy = GPM(threshold=1.0, samples=4, rank_rule="energy")
    task = stream[0]
    engine = learn(learner, strategy, stream[:1])
    kept = task.sample(4, 0)
    layers = {layer.name: layer for layer in learner.layers(strategy.protect)}
    learner.eval()
    before = {n: layer.matrix(layer.weight.detach(), layer.bias) for n, layer in layers.items()}
    before = {n: m.detach().clone() for n, m in before.items()}
    engine.learn(stream[1], Plan(stream[1].train))
    for name, layer in layers.items():
        change = layer.matrix(layer.weight.detach(), layer.bias).detach() - before[name]
        M = strategy.memory[name].float()
        assert float((change @ M[:, :4]).norm()) <= 1e-4 * max(1.0, float(before[name].norm()))
    assert kept["input_ids"].shape[0] == 4


# -- freeze -----------------------------------------------------------------------------------


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


# -- pre-training -----------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CL_BENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_pretraining_is_done_once_and_gives_the_same_weights_to_everybody(cache):
    first, made = pretrained()
    again, found = pretrained()
    assert not made.from_cache
    assert found.from_cache
    assert made.fingerprint == found.fingerprint
    assert made.final_loss > 0
    for (name, a), (_, b) in zip(first.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    fresh = make_causal()
    assert any(
        not torch.equal(a, b) for a, b in zip(first.parameters(), fresh.parameters(), strict=True)
    )
    torch.nn.init.zeros_(first.heads[0].weight)
    first.reset_weights()  # back to pre-trained, not to random
    assert torch.equal(first.heads[0].weight, again.heads[0].weight)


def test_pretraining_without_a_cache_gives_the_same_weights(cache, monkeypatch, tmp_path):
    one, _ = pretrained()
    monkeypatch.setenv("CL_BENCH_CACHE", str(tmp_path / "another"))
    two, found = pretrained()
    assert not found.from_cache
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_another_seed_recipe_or_network_is_another_checkpoint(cache):
    from dataclasses import replace

    recipe = world(pretrained=True).pretraining
    names = {pretrained()[1].identity, pretrained(seed=1)[1].identity}
    names.add(pretrained(recipe=replace(recipe, learning_rate=2e-3))[1].identity)
    names.add(pretrained(recipe=replace(recipe, identity="other text"))[1].identity)
    names.add(pretrained(depth=1)[1].identity)
    names.add(pretrained(dropout=0.1)[1].identity)
    assert len(names) == 6


def test_half_a_checkpoint_is_never_used(cache):
    _, made = pretrained()
    (path,) = cache.glob("pretrained-*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match="damaged"):
        _, found = pretrained()
    assert not found.from_cache
    assert found.fingerprint == made.fingerprint
    assert path.read_bytes() == whole
    assert not list(cache.glob(".*"))


def test_a_run_that_waits_takes_what_the_other_made(cache):
    script = (
        "from biographies import pretrained\n"
        "print('from cache' if pretrained()[1].from_cache else 'made')"
    )
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/helpers'}",
    }
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", script], cwd=ROOT, env=environment, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    said = sorted(run.communicate()[0].decode().strip().splitlines()[-1] for run in runs)
    assert said == ["from cache", "made"]


def test_an_unwritable_cache_costs_time_only(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("CL_BENCH_CACHE", str(blocked / "cache"))
    with pytest.warns(UserWarning, match="CL_BENCH_CACHE"):
        _, found = pretrained()
    assert not found.from_cache


def test_rates_rise_and_fall():
    recipe = Pretraining("", lambda seed: iter(()), steps=100, warmup=10, final_rate=0.1)
    rates = [recipe.rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0) == max(rates)
    assert rates[100] == pytest.approx(0.1) == min(rates)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_diverging_pretraining_says_so(cache):
    from dataclasses import replace

    recipe = replace(world(pretrained=True).pretraining, learning_rate=1e30)
    with pytest.raises(UsageError, match=r"stream\.pretrain\.learning_rate"):
        pretrained(recipe=recipe)


# -- the loop ---------------------------------------------------------------------------------


class Sized(Task):
    """A task that says how long and how fast it is learned."""

    def __init__(self, index, epochs, rate):
        self.name, self.index, self.head, self.classes = f"s{index}", index, 0, range(20)
        self.origin = Origin("generated", "none", "none")
        self.epochs, self.rate = epochs, rate
        tokens = torch.randint(2, 20, (16, 6))
        self.data = MemoryData(
            {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}
        )

    @property
    def train(self):
        return self.data

    validation = test = train


def test_a_task_decides_its_epochs_and_scales_the_rate():
    stream = LanguageStream(
        "sized",
        [Sized(0, 3, 0.5), Sized(1, None, 1.0)],
        6,
        "sized",
        vocabulary=[str(i) for i in range(20)],
        end=1,
        pad=0,
    )
    rates = []

    class Heard(Silent):
        def epoch(self, *args, **fields):
            if fields:
                rates.append((fields["task"], fields["learning_rate"]))

    model = make_model(vocabulary=20)
    learner = Causal(stream, model, functools.partial(SGD, lr=0.1), batch_size=8, seed=0)
    trainer = functools.partial(_Trainer().__call__, max_epochs=2)
    engine = LightningEngine(
        learner, Finetune(), trainer, LoopSettings(0, 8), None, Heard(), Silent()
    )
    for task in stream:
        engine.learn(task, Plan(task.train))
    assert rates == [(0, 0.05)] * 3 + [(1, 0.1)] * 2
    scores = engine.evaluate(list(stream), 100, None)
    assert set(scores) == {"s0", "s1"}
    assert set(engine.details["s0"]) == {"first_token", "first_token_probability"}


def test_probes_are_scored_beside_the_matrix():
    stream, learner = world(), make_causal()
    engine = LightningEngine(
        learner, Finetune(), _Trainer(), LoopSettings(0, 8), None, Silent(), Silent()
    )
    scores = engine.evaluate(list(stream), 7, None)
    assert set(scores) == {"read_about", "new_1"}
    found = engine.details["read_about"]
    assert {"biography", "control", "biography/first_token", "type_rate"} <= set(found)
    assert "biography" not in engine.details["new_1"]
    batch = stream[0].test[torch.arange(len(stream[0].test))]
    learner.eval()
    first = learner.details(learner(batch), batch)["first_token"]
    assert found["first_token"] == pytest.approx(float(first.mean()))
    assert learner.performance(batch) == pytest.approx(scores["read_about"])


def test_without_transformers_one_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"pip install 'cl_bench\[language\]'"):
        gpt(10)


def test_importing_cl_bench_does_not_need_transformers():
    """Nothing of ours imports it before a language model is made (torchmetrics may, if it can)."""
    for path in (*(ROOT / "cl_bench").rglob("*.py"), *(ROOT / "tasks").rglob("*.py")):
        for line in path.read_text().splitlines():
            assert not line.startswith(("import transformers", "from transformers", "import peft"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"architecture": "rnn"}, "model.architecture=rnn"),
        ({"width": 10, "heads": 3}, "heads must divide"),
        ({"depth": 0}, "model.depth=0"),
    ],
)
def test_models_name_wrong_sizes(options, words):
    with pytest.raises(UsageError, match=words):
        gpt(**({"vocabulary": 10} | options))


def run_cli(directory, cache, *overrides):
    command = [sys.executable, "-m", "cl_bench", *overrides, f"run_dir={directory}"]
    environment = {**os.environ, "CL_BENCH_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*command, "logger.mode=disabled"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    events = [json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()]
    return ran.stdout, events


def test_smoke_tier_from_the_command_line(tmp_path):
    """Two strategies: the second takes the first one's checkpoint, and both start from row 0."""
    rows, sources = [], []
    for strategy in ("finetune", "freeze"):
        _, events = run_cli(
            tmp_path / strategy,
            tmp_path / "cache",
            f"+strategy={strategy}",
            "+stream=biography/smoke",
        )
        (read,) = [e for e in events if e.get("status") == "pretrained"]
        sources.append(read["from_cache"])
        evaluations = [e for e in events if e["event"] == "evaluation"]
        assert [e["row"] for e in evaluations] == [0, 1, 2]
        rows.append(evaluations[0]["details"])
        assert {"biography", "control", "type_rate"} <= set(evaluations[2]["details"]["read_about"])
        data = json.loads((tmp_path / strategy / "data.json").read_text())
        assert data["tasks"][0]["facts"]["floors"]["exact_match"]["mean"] < 0.2
    assert sources == [False, True]
    assert rows[0] == rows[1]
    assert rows[0]["read_about"]["biography/type_rate"] > 0.9  # it did read


@pytest.mark.parametrize("strategy", ["gpm", "rogo", "er", "task_vector"])
def test_strategies_run_on_biographies_as_configured(strategy, tmp_path, monkeypatch):
    """Their own configuration, on the smoke tier cut down, with everything that can be probed."""
    monkeypatch.setenv("CL_BENCH_CACHE", str(tmp_path / "cache"))
    probed = [f"probe.{p}.enabled=true" for p in ("updates", "features", "recovery", "landscape")]
    if strategy in ("gpm", "rogo"):
        probed.append("strategy.protect.embeddings=free")
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = hydra.compose(
            "config",
            [
                *(f"+strategy={strategy}", "+stream=biography/smoke", "logger.mode=disabled"),
                *("stream.people=40", "stream.new_people=20", "stream.epochs=[1,5]"),
                *("stream.pretrain.steps=10", "eval.dense=[0,2]", "probe.early=[0,2]"),
                *("probe.landscape.along_early=[0,1,2]", "probe.landscape.along_late=[0,1,2]"),
                *("probe.recovery.steps=2", "trainer.accelerator=cpu", *probed),
                f"run_dir={tmp_path / 'run'}",
            ],
        )
    result = run_config(cfg, "python -m cl_bench", {"strategy": strategy})
    assert result.matrix.shape == (3, 2)
    found = {e["probe"] for e in read_results(tmp_path / "run") if e["event"] == "probe"}
    assert found == {"curve", "dynamics", "alignment", "landscape", "cost"}
    layers = [e["layers"] for e in read_results(tmp_path / "run") if e["event"] == "layers"]
    block, embedding = layers[1]["backbone.layers.0"], layers[1]["backbone.embed_in"]
    assert 0 <= block["feat/read_about/task/pc_angle"] <= 90
    # Every prompt ends with the same token: its embedding may move, and varies in no direction.
    assert layers[1]["embeddings"]["feat/read_about/early/shift"] > 0
    assert layers[1]["embeddings"]["feat/read_about/early/pc_angle"] is None
    assert 0 <= embedding["wupd/previous-task/theta_mean"] <= 90
    assert (tmp_path / "run/curve.png").exists()
    assert (tmp_path / "run/landscape_2.png").exists()


def test_seed_training_is_what_models_are_drawn_from():
    seed_training(5)
    one = make_model()
    seed_training(6)
    two = make_model()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
