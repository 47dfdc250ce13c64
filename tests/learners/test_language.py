"""Prompts with answers: tokens, masks, generation, scores, and strategies on top."""

import copy
import functools
import string

import pytest
import torch
from lightning import Trainer
from texts import FAMILIES, TEXTS, make_learner, make_stream, one, whole
from torch.optim import SGD, AdamW
from toys import Silent

from cl_bench.contracts import IGNORE, Protect, UsageError
from cl_bench.experiment import LightningEngine, LoopSettings
from cl_bench.experiment.loader import EvalLoader
from cl_bench.learners import Causal, Seq2Seq, language
from cl_bench.metrics.answers import normalised
from cl_bench.metrics.answers.edit_similarity import edit_similarity
from cl_bench.metrics.answers.exact_match import exact_match
from cl_bench.metrics.answers.first_letter import first_letter
from cl_bench.metrics.answers.rouge_l import rouge_l
from cl_bench.models import gpt, t5
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.baselines.joint import Joint
from cl_bench.strategies.isolation.freeze import Freeze
from cl_bench.strategies.merging.task_vector import TaskVector
from cl_bench.strategies.penalty.ewc import EWC
from cl_bench.strategies.projection.adam_nscl import AdamNSCL
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.strategies.projection.rogo import ROGO
from cl_bench.strategies.projection.sgp import SGP
from cl_bench.strategies.replay.er import ER

transformers = pytest.importorskip("transformers")


def snapshot(learner):
    return {name: p.detach().clone() for name, p in learner.named_parameters()}


# -- tokens and masks -------------------------------------------------------------------------


def test_a_batch_says_prompt_and_answer():
    stream = make_stream()
    batch = whole(stream[1].test)
    assert batch["input_ids"].shape == (2, 47)  # a place is left for the encoder's end token
    assert batch["labels"].shape == (2, 16)
    for row, (text, label) in enumerate(TEXTS["size"]):
        prompt = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        assert stream.text(prompt) == text
        labels = batch["labels"][row]
        assert int(labels[labels != IGNORE][-1]) == stream.end
        assert stream.text(labels) == label
        assert stream.answer(int(batch["example"][row])) == label


def test_long_prompts_lose_their_end_and_too_long_labels_are_refused():
    stream = make_stream(length=10)
    batch = whole(stream[0].test)
    assert stream.text(batch["input_ids"][0]) == "the sky i"
    with pytest.raises(UsageError, match=r"answer_length=6.*11 tokens"):
        make_stream(answer=6)


@pytest.mark.parametrize("family", FAMILIES)
def test_extra_padding_changes_no_moment_no_loss_and_no_answer(family):
    short, long = make_stream(), make_stream(length=70)
    learner = make_learner(family, short).eval()
    wide = make_learner(family, long).eval()
    wide.load_state_dict(learner.state_dict())
    batch, wider = whole(short[0].test), whole(long[0].test)
    layers = learner.layers(Protect(bias="free"))
    moments = learner.tap(layers, [batch])
    # However the batch is put together: each sample alone has no padding at all.
    alone = learner.tap(layers, [one(batch, i) for i in range(len(batch["labels"]))])
    others = wide.tap(wide.layers(Protect(bias="free")), [wider])
    learner._uncut = True  # with every column of padding
    padded = learner.tap(layers, [batch])
    learner._uncut = False
    prompt, answer = batch["attention_mask"].sum(), (batch["labels"] != IGNORE).sum()
    for name in moments:
        for found in (alone, others, padded):
            assert found[name].rows == moments[name].rows
            assert torch.allclose(found[name].gram, moments[name].gram, atol=1e-5), name
        reads = name.startswith("backbone.encoder") or name.endswith(
            ("EncDecAttention.k", "EncDecAttention.v")
        )
        rows = answer if family == "t5" else prompt + answer
        assert moments[name].rows == int(prompt + len(batch["labels"]) if reads else rows), name
    assert torch.allclose(
        learner.loss(learner(batch), batch), wide.loss(wide(wider), wider), atol=1e-6
    )
    assert learner.answers(batch) == wide.answers(wider)


def test_masks_are_told_apart_where_prompts_are_as_long_as_answers():
    stream = make_stream()
    learner = make_learner("t5", stream)
    batch = one(whole(stream[0].test), 1)  # "grass" and its end token; "green" and its own
    batch = {**batch, "labels": torch.where(batch["labels"] == IGNORE, 5, batch["labels"])}
    assert learner.cut(batch)["labels"].shape[1] != learner.cut(batch)["input_ids"].shape[1]
    square = {**batch, "labels": batch["labels"][:, :6]}
    square["labels"][:, 4:] = IGNORE
    learner._uncut = True
    square["input_ids"], square["attention_mask"] = (
        batch[k][:, :5] for k in ("input_ids", "attention_mask")
    )
    moments = learner.tap(learner.layers(Protect()), [square])
    assert moments["backbone.encoder.block.0.layer.0.SelfAttention.q"].rows == 6
    assert moments["backbone.decoder.block.0.layer.0.SelfAttention.q"].rows == 4
    assert moments["backbone.decoder.block.1.layer.1.EncDecAttention.q"].rows == 4
    assert moments["backbone.decoder.block.1.layer.1.EncDecAttention.k"].rows == 6


def test_encoder_decoder_loss_is_that_of_transformers():
    stream = make_stream()
    learner = make_learner("t5", stream).eval()
    batch = whole(stream[0].test)
    text = [example.prompt for example in stream[0].splits["test"]]
    read = transformers.ByT5Tokenizer(extra_ids=0)(text, return_tensors="pt", padding=True)
    out = learner.model(**read, labels=batch["labels"])
    assert torch.allclose(learner.loss(learner(batch), batch), out.loss, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_causal_models_read_the_answer_right_behind_the_prompt(family):
    stream = make_stream()
    learner = make_learner(family, stream).eval()
    batch = whole(stream[1].test)
    joined = learner.joined(batch)
    total, count = 0.0, 0
    for i, (text, label) in enumerate(TEXTS["size"]):
        tokens = [b + 3 for b in f"{text}{label}".encode()] + [1]
        length = len(tokens)
        assert joined["input_ids"][i, :length].tolist() == tokens
        assert int(joined["attention_mask"][i].sum()) == length
        ids = torch.tensor([tokens])
        likelihood = learner.model(input_ids=ids).logits.log_softmax(2)
        for j in range(len(text), length):
            total -= float(likelihood[0, j - 1, tokens[j]].detach())
            count += 1
    loss = learner.loss(learner(batch), batch)
    assert float(loss.detach()) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(family):
    plain, saving = make_learner(family), make_learner(family, gradient_checkpointing=True)
    batch = whole(make_stream()[0].test)
    for learner in (plain, saving):
        learner.train()
        learner.loss(learner(batch), batch).backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_per_sample_gradients_are_those_of_the_samples(family):
    learner, batch = make_learner(family), whole(make_stream()[0].test)
    every = learner.gradients(batch, per_sample=True)
    for i in range(3):
        for name, own in learner.gradients(one(batch, i)).items():
            assert torch.allclose(every[name][i], own, atol=1e-5), name


# -- scores -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Science & Mathematics", "science mathematics"),
        ("  Very\tNegative. ", "very negative"),
        ("The end", "the end"),
        ("'A'", "a"),
        (string.punctuation, ""),
    ],
)
def test_normaliser(text, wanted):
    assert normalised(text) == wanted


def test_empty_answers_are_wrong_even_where_nothing_is_right():
    assert exact_match("", "-", "") == exact_match("", "-", "-") == 0.0  # MNLI's unlabelled rows
    assert exact_match("", "Good", "good!") == 1.0


def test_metrics_of_free_text():
    assert first_letter("", "B. because", " B") == 1.0
    assert first_letter("", "B", "") == first_letter("", "B", "A") == 0.0
    assert rouge_l("", "a b c d", "a x c") == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert edit_similarity("", "x = <NUM_LIT:3>", "x = 3") == 1.0
    assert edit_similarity("", "abcd", "abxd") == pytest.approx(2 * 3 / 8)
    assert edit_similarity("", "a", "") == 0.0


@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_score_grades_what_generation_gives(family):
    """A model that has learned some answers; the shortcut for those agrees with generating all."""
    stream = make_stream()
    learner = make_learner(family, stream)
    batch = whole(stream[0].test)
    learned = one(batch, 1)
    optimizer = AdamW(learner.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        learner.loss(learner(learned), learned).backward()
        optimizer.step()
    learner.eval()
    score = learner.score(learner(batch), batch)
    answers = learner.answers(batch)
    assert answers[1] == "green"
    right = [label for _, label in TEXTS["colour"]]
    wanted = [float(normalised(a) == r) for a, r in zip(answers, right, strict=True)]
    assert score.tolist() == wanted == [0.0, 1.0, 0.0]
    assert learner.performance(learned) == 1.0
    # What a model says is what counts: another spelling of the right answer is right.
    learner.answers = lambda batch: ["BLUE.", "very green", ""][: len(batch["labels"])]
    assert learner.score(torch.zeros_like(learner(batch)), batch).tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_answers_do_not_depend_on_what_else_is_in_the_batch(family):
    learner, batch = make_learner(family), whole(make_stream()[0].test)
    together = learner.answers(batch)
    assert [learner.answers(one(batch, i))[0] for i in range(3)] == together
    assert learner.training  # and leave no trace


@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_label_likelihood_compares_sums_over_the_tasks_own_answers(family):
    stream = make_stream()
    learner = make_learner(family, stream, label_likelihood=True).eval()
    batch = whole(stream[0].test)
    labels = stream[0].labels
    found = learner.details(learner(batch), batch)["label_likelihood"]
    for i in range(3):
        sums = []
        for label in labels:
            tokens = torch.tensor([[b + 3 for b in label.encode()] + [1]])
            changed = {
                **one(batch, i),
                "labels": torch.nn.functional.pad(tokens, (0, 2), value=-100),
            }
            logits, wanted = learner.targets(learner(changed), changed)
            keep = wanted != IGNORE
            sums.append(logits.log_softmax(2)[keep].gather(1, wanted[keep][:, None]).sum())
        right = labels[int(torch.stack(sums).argmax())] == TEXTS["colour"][i][1]
        assert bool(found[i]) == right
    assert not make_learner(family).details(learner(batch), batch)


def test_evaluation_is_sorted_by_length_and_sees_every_sample():
    data = make_stream()[0].train
    loader = EvalLoader(data, 4)
    seen = torch.cat([batch["example"] for batch in loader]) - data.first
    assert seen.sort().values.tolist() == list(range(len(data)))
    assert data.lengths[seen].tolist() == sorted(data.lengths.tolist())


# -- strategies -------------------------------------------------------------------------------


STRATEGIES = {
    "finetune": Finetune(),
    "gpm": GPM(threshold=0.9, samples=6),
    "sgp": SGP(threshold=0.9, samples=6),
    "rogo": ROGO(threshold=0.9, samples=6, relax_samples=6),
    "adam_nscl": AdamNSCL(samples=6),
    "freeze": Freeze(1, tied="freeze"),
    "ewc": EWC(samples=4),
    "er": ER(memory=4),
    "joint": Joint(),
    "task_vector": TaskVector(0.5),
}


@pytest.mark.parametrize("family", ["t5", "gpt2"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_run_unchanged(family, name):
    stream = make_stream()
    learner = make_learner(family, stream, tied=True)
    before = snapshot(learner)
    strategy = copy.deepcopy(STRATEGIES[name])

    def trainer(callbacks=(), **options):
        quiet = dict.fromkeys(
            ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
        )
        return Trainer(accelerator="cpu", max_epochs=2, callbacks=list(callbacks), **quiet)

    engine = LightningEngine(
        learner, strategy, trainer, LoopSettings(0, 4), None, Silent(), Silent()
    )
    for t, task in enumerate(stream):
        engine.learn(task, strategy.plan(stream, t))
    after = snapshot(learner)
    assert any(not torch.equal(before[n], after[n]) for n in before)
    assert all(p.isfinite().all() for p in after.values())


@pytest.mark.parametrize("family", ["t5", "gpt2"])
@pytest.mark.parametrize("optimizer", [SGD, AdamW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("tied", ["project", "frozen_after_first", "free"])
def test_what_old_prompts_told_every_layer_stays(family, optimizer, tied):
    """No protected matrix moves along old inputs; embeddings and norms do not move at all."""
    stream = make_stream()
    learner = make_learner(family, stream, functools.partial(optimizer, lr=0.01), tied=True)
    protect = Protect(tied=tied)
    gpm = GPM(threshold=0.8, samples=3, rank_rule="energy", protect=protect)
    old, new = whole(stream[0].test), whole(stream[1].test)
    gpm.consolidate(learner, stream[0], learner.tap(learner.layers(protect), [old]))
    layers = {layer.name: layer for layer in learner.layers(protect)}
    held = {
        n: layer.matrix(layer.weight, layer.bias).detach().clone() for n, layer in layers.items()
    }
    weights = snapshot(learner)
    learner.begin(stream[1], gpm)
    stepper = optimizer(learner.trainable_parameters(), lr=0.01)
    for _ in range(3):
        stepper.zero_grad()
        out = learner(new)
        learner.loss(out, new).backward()
        gpm.constrain(learner)
        stepper.step()
        gpm.after_step(learner, new, out)
    gpm.release(learner)
    for name, layer in layers.items():
        change = layer.matrix(layer.weight, layer.bias).detach() - held[name]
        leak = (change @ gpm.memory[name].float()).norm()
        assert float(leak) <= 1e-5 * max(1.0, float(held[name].norm())), name
    moved = {n for n, w in snapshot(learner).items() if not torch.equal(w, weights[n])}
    table = next(n for n, p in learner.named_parameters() if p is learner.heads[0].weight)
    assert (table in moved) == (tied != "frozen_after_first")
    assert ("heads.0" in layers) == (tied != "free")
    still = ("norm", "ln_", "relative_attention_bias", "wpe")
    assert moved - {table}
    assert not [n for n in moved for part in still if part in n]


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_norms_by_name(tied):
    learner = make_learner("t5", tied=tied)
    assert len(learner.blocks()) == 4
    assert learner.tied == tied
    assert all(m.num_embeddings == 259 for m in learner.embeddings())
    learner.guard(Protect(), first_task=True)
    assert all(p.requires_grad for p in learner.parameters())
    learner.guard(Protect(), first_task=False)
    frozen = {n for n, p in learner.named_parameters() if not p.requires_grad}
    assert all("norm" in n or "relative" in n or "shared" in n for n in frozen)
    assert ("backbone.shared.weight" in frozen) == (not tied)
    assert sum("norm" in n for n in frozen) == 2 * 2 + 2 * 3 + 2
    names = [layer.name for layer in learner.layers(Protect(tied="free"))]
    assert ("heads.0" in names) == (not tied)


def test_the_model_with_its_weights_is_transformers_own():
    learner = make_learner("t5", tied=True)
    kind = type(learner.model)
    fresh = kind(learner.config)
    fresh.load_state_dict(learner.model.state_dict())
    read = torch.tensor([[5, 6, 7]])
    again = fresh.eval()(input_ids=read, decoder_input_ids=read).logits
    learner.eval()
    assert torch.equal(again, learner.model(input_ids=read, decoder_input_ids=read).logits)
    copied = copy.deepcopy(learner)
    with torch.no_grad():
        copied.heads[0].weight.zero_()
    assert float(copied.model.get_output_embeddings().weight.abs().sum()) == 0
    assert float(learner.heads[0].weight.detach().abs().sum()) > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: Seq2Seq(s, gpt(259), SGD, 4, 0), "needs an encoder-decoder"),
        (lambda s: Causal(s, t5(259), SGD, 4, 0), "needs a causal language model"),
        (lambda s: language(s, t5(100), SGD, 4, 0), "has 100 tokens, stream 'toy' needs 259"),
    ],
)
def test_learners_refuse_what_they_cannot_learn(make, message):
    with pytest.raises(UsageError, match=message):
        make(make_stream())
