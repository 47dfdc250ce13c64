"""Causal language models: masks, scores, decoding, the services strategies stand on."""

import copy
import functools
import sys
import warnings
from pathlib import Path

import pytest
import torch
from biographies import batch_of, learn, make_causal, snapshot, world
from torch import nn
from torch.optim import SGD, AdamW

from cl_bench.contracts import IGNORE, Plan, Protect, UsageError
from cl_bench.experiment import Together
from cl_bench.models import gpt
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.baselines.joint import Joint
from cl_bench.strategies.isolation.freeze import Freeze
from cl_bench.strategies.merging.task_vector import TaskVector
from cl_bench.strategies.penalty.ewc import EWC
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.strategies.projection.rogo import ROGO
from cl_bench.strategies.replay.er import ER

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


# -- the loop ---------------------------------------------------------------------------------


def test_without_transformers_one_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"pip install 'cl_bench\[language\]'"):
        gpt(10)


def test_importing_cl_bench_does_not_need_transformers():
    """Nothing of ours imports it before a language model is made (torchmetrics may, if it can)."""
    theirs = ROOT / "cl_bench/integrations/huggingface.py"  # a callback of theirs, by itself
    for path in {*(ROOT / "cl_bench").rglob("*.py"), *(ROOT / "tasks").rglob("*.py")} - {theirs}:
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
