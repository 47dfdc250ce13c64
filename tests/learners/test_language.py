"""Prompts with answers: masks, generation, scores, streams from files, pretrained models.

Models here are tiny and random: they prove that the path works, nothing about language.
"""

import copy
import functools
import gzip
import itertools
import json
import string

import pytest
import torch
from conftest import DATA_AT_HAND
from lightning import Trainer
from texts import FAMILIES, TEXTS, make_learner, make_stream
from torch.optim import SGD, AdamW
from toys import Silent

from cl_bench.contracts import IGNORE, Protect, UsageError
from cl_bench.experiment import LightningEngine, LoopSettings
from cl_bench.experiment.loader import EvalLoader
from cl_bench.learners import Causal, Seq2Seq, language
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
from cl_bench.tasks.t5_cl_hub import HUB, HubText
from cl_bench.tasks.text import Prompt
from cl_bench.tasks.text.benchmark import COMPLETE, ORDERS, SOURCES, digest, places, read_rows
from cl_bench.tasks.text.codec import WordCodec
from cl_bench.tasks.text.metrics import (
    edit_similarity,
    exact_match,
    first_letter,
    normalised,
    rouge_l,
    verbatim,
)
from cl_bench.tasks.text.pinned import PINNED
from cl_bench.tracking import read_results

transformers = pytest.importorskip("transformers")

DATA = DATA_AT_HAND / "cl_benchmark"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no {DATA}")


def whole(data):
    return data[torch.arange(len(data))]


def one(batch, i):
    return {name: value[i : i + 1] for name, value in batch.items()}


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


# -- prompts, orders, files -------------------------------------------------------------------


def test_prompts_to_the_letter():
    labels = ("World", "Sports")
    text = "Title: A {b}\nText: c\n"
    body = (
        "What is the topic of the following paragraph? Choose one from the option.\n"
        "Option: World, Sports \nTitle: A {b}\nText: c\n\nAnswer:"
    )
    assert Prompt()(text, "TC", "agnews", labels) == f"Task:TC\nDataset:agnews\n{body}"
    assert Prompt(task_tag=False)(text, "TC", "agnews", labels) == body
    assert Prompt()("Which?\nA: x\nB: y", "COPA", "COPA", ("A", "B")) == (
        "Task:COPA\nDataset:COPA\nWhich?\nA: x\nB: y\nAnswer:"
    )
    with pytest.raises(UsageError, match="layout=chat"):
        Prompt(layout="chat")


def test_task_tags_say_that_the_task_is_known():
    assert make_stream(task_tag=True).task_id_at_test
    assert not make_stream().task_id_at_test


def test_orders_are_permutations_of_four_or_fifteen_tasks():
    assert [len(ORDERS[k]) for k in range(1, 7)] == [4, 4, 4, 15, 15, 15]
    assert all(set(ORDERS[k]) == set(SOURCES) for k in (4, 5, 6))
    assert ORDERS[1] == ("dbpedia", "amazon", "yahoo", "agnews")
    assert sum(s.train for s in SOURCES.values()) == 55650
    assert sum(s.test for s in SOURCES.values()) == 70861


def test_words():
    codec = WordCodec(["The cat. The dog", "the mouse"], 7, ["Cat"])
    assert codec.pieces == ("<pad>", "<end>", "<other>", "cat", "the", ".", "dog")
    assert codec.encode("The mouse, cat") == [4, 2, 2, 3]
    assert codec.decode([4, 3, 1, 6]) == "the cat"


@needs_data
@pytest.mark.parametrize("name", COMPLETE)
def test_shared_files_are_the_benchmarks(name):
    train, test = (read_rows(places(DATA, name, split)[0]) for split in ("train", "test"))
    assert (len(train), len(test)) == (SOURCES[name].train, SOURCES[name].test)
    assert not {text for text, _ in train} & {text for text, _ in test}
    allowed = {*SOURCES[name].labels, *(["-"] if name == "MNLI" else [])}
    assert {label for _, label in train + test} <= allowed
    listed = json.loads((DATA / "manifest.json").read_text())[name]
    assert tuple(listed["labels"]) == SOURCES[name].labels
    assert listed["category"] == SOURCES[name].category
    assert digest(train) == PINNED[name, "train"]
    assert digest(test) == PINNED[name, "test"]


def test_other_rows_than_the_benchmarks_are_refused(tmp_path):
    from cl_bench.tasks.t5_cl import T5CL

    write_benchmark(tmp_path, "COPA", True)
    with pytest.raises(UsageError, match=r"COPA\.train.*not the benchmark's.*stream\.verify=false"):
        T5CL(str(tmp_path), tasks=["COPA"])
    T5CL(str(tmp_path), tasks=["COPA"], verify=False)


def test_characters_that_unicode_ends_a_line_with_end_no_row(tmp_path):
    path = tmp_path / "IMDB.train.jsonl.gz"
    rows = [{"sentence": "one\u2028two\x85three", "label": "Good"}] * 2
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes(gzip.compress(f"{lines}\n".encode()))
    assert read_rows(path) == [("one\u2028two\x85three", "Good")] * 2


def write_benchmark(folder, name, packed, rows=None):
    source = SOURCES[name]
    for split, count in (("train", source.train), ("test", source.test)):
        made = [
            {"sentence": f"{split} {i}", "label": source.labels[i % len(source.labels)]}
            for i in range(count if rows is None else rows)
        ]
        if packed:
            lines = "\n".join(json.dumps(row) for row in made)
            (folder / f"{name}.{split}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        else:
            path = folder / source.category / name / f"{split}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(made))


@pytest.mark.parametrize("packed", [True, False])
def test_benchmark_files_in_our_form_or_the_repositorys(packed, tmp_path):
    from cl_bench.tasks.t5_cl import T5CL

    write_benchmark(tmp_path, "COPA", packed)
    write_benchmark(tmp_path, "CB", packed)
    made = [
        T5CL(
            str(tmp_path),
            tasks=["COPA", "CB"],
            validation_fraction=0.2,
            split_seed=seed,
            verify=False,
        )
        for seed in (0, 0, 1)
    ]
    held = [{e.text for e in s[0].splits["validation"]} for s in made]
    assert len(held[0]) == 80
    assert held[0] == held[1] != held[2]
    assert not held[0] & {e.text for e in made[0][0].splits["train"]}
    assert all(text.startswith("train") for text in held[0])
    assert made[0].fingerprint == made[1].fingerprint != made[2].fingerprint
    assert made[0][1].facts["train_samples"] == 200


def test_missing_and_cut_files_are_named(tmp_path):
    from cl_bench.tasks.t5_cl import T5CL

    write_benchmark(tmp_path, "COPA", True)
    with pytest.raises(UsageError) as caught:
        T5CL(str(tmp_path), tasks=["COPA", "CB"])
    for part in ("CB.train.jsonl.gz", "NLI/CB/test.json", "07117e1", "t5_cl_fewshot"):
        assert part in str(caught.value)
    assert "COPA" not in str(caught.value)
    write_benchmark(tmp_path, "CB", True, rows=7)
    with pytest.raises(UsageError, match="7 rows, the benchmark's file has 250"):
        T5CL(str(tmp_path), tasks=["CB"])
    (tmp_path / "CB.train.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(UsageError, match="not rows of"):
        T5CL(str(tmp_path), tasks=["CB"])


@pytest.mark.parametrize("right", ["1.5", "-7", "1/2", "12:30", "10%"])
def test_numbers_keep_their_points_and_signs(right):
    assert verbatim("", right, f"{right} ") == 1.0
    assert verbatim("", right, normalised(right)) == 0.0
    assert verbatim("", right, "") == verbatim("", right, right + "0") == 0.0


def test_trace_reads_records_and_scores_each_task_in_its_way(tmp_path):
    from cl_bench.tasks.trace import EPOCHS, METRICS, Trace

    for name, split in itertools.product(METRICS, ("train", "eval", "test")):
        (tmp_path / name).mkdir(exist_ok=True)
        record = {"prompt": f"{name}?", "answer": "B. so"}
        (tmp_path / name / f"{split}.json").write_text(json.dumps([record] * 2))
    own = [name for name in METRICS if name != "20Minuten"]
    stream = Trace(str(tmp_path), tasks=own)
    assert [task.epochs for task in stream] == list(EPOCHS[:7])
    grades = {t.name: stream.grade(int(t.test[torch.tensor([1])]["example"]), "B") for t in stream}
    assert grades["ScienceQA"] == 1.0
    assert grades["FOMC"] == 0.0
    number = int(stream[5].test[torch.tensor([0])]["example"])
    assert stream[5].name == "NumGLUE-cm"
    assert stream.grade(number, " B. so") == 1.0
    assert stream.grade(number, "b so") == 0.0
    assert grades["MeetingBank"] == pytest.approx(2 / 3)
    assert 0 < grades["Py150"] < 1
    assert not stream.options(0)
    with pytest.raises(UsageError, match="feralvam/easse"):
        Trace(str(tmp_path))
    (tmp_path / "FOMC" / "eval.json").unlink()
    with pytest.raises(UsageError, match=r"missing FOMC/eval\.json"):
        Trace(str(tmp_path), tasks=own)


def test_hub_streams_draw_every_class_alike(monkeypatch):
    import datasets

    def load(name, config, split):
        task = next(t for t, found in HUB.items() if found.dataset == name)
        found, labels = HUB[task], SOURCES[task].labels
        keys = ("title", "content", "review_title", "review_text", "question_title", "text")
        keys += ("question_content", "best_answer")
        rows = [{k: f"{k} {split} {i}" for k in keys} for i in range(5 * len(labels))]
        for i, row in enumerate(rows):
            row[found.label] = i % len(labels) + found.first
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    stream = HubText(order=3, per_class=4, test_samples=20)
    assert [task.name for task in stream] == list(ORDERS[3])
    assert [len(task.train) for task in stream] == [40, 20, 16, 56]
    assert all(len(task.test) == 20 for task in stream)
    assert stream[0].splits["train"][0].text.startswith("Title: question_title train")
    with pytest.raises(UsageError, match="5 train rows of class"):
        HubText(per_class=9)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: 1 / 0)
    with pytest.raises(UsageError, match="cannot be had from the hub"):
        HubText()


# -- the command line -------------------------------------------------------------------------


def test_without_data_one_error_says_what_to_do(cli):
    status, _, error = cli("+strategy=rogo", "+stream=t5_cl")
    assert status == 2
    assert error.startswith("error: stream.data_dir=null: ")
    assert "git clone https://github.com/cmnfriend/O-LoRA" in error
    offline = "+stream=t5_cl_fewshot model=t5_tiny stream.data_dir=/path/to/CL_Benchmark"
    assert offline in error
    assert len(error.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders as save_pretrained writes them: tiny, random, with tokenizers of their own."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    t5(259, depth=1, width=16, heads=2, feed_forward=16).save_pretrained(folder / "t5")
    transformers.ByT5Tokenizer(extra_ids=0).save_pretrained(folder / "t5")
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = (text for rows in TEXTS.values() for row in rows for text in row)
    special = ["<unk>", "<s>", "</s>"]
    letters = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=letters)
    )
    from tokenizers.decoders import ByteLevel
    from tokenizers.processors import TemplateProcessing

    raw.decoder = ByteLevel()
    raw.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder / "llama")
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=600,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "llama")
    return folder


def test_a_llama_reads_its_start_token_and_the_answer_with_its_end_token(saved):
    from cl_bench.models import pretrained

    stream = make_stream(tokenizer=str(saved / "llama"))
    assert stream.pad == stream.end == 2
    learner = language(stream, pretrained(str(saved / "llama")), SGD, 4, 0)
    assert isinstance(learner, Causal)
    joined = learner.joined(whole(stream[0].test))
    for row, mask in zip(joined["input_ids"], joined["attention_mask"], strict=True):
        tokens = row[mask.bool()].tolist()
        assert tokens[0] == 1
        assert tokens[-1] == 2
        assert 2 not in tokens[:-1]
    batch = whole(stream[0].test)
    together = learner.answers(batch)
    assert [learner.answers(one(batch, i))[0] for i in range(3)] == together
    norms = [n for n, _ in learner.named_parameters() if "norm" in n]
    learner.guard(Protect(), first_task=False)
    assert all(not dict(learner.named_parameters())[n].requires_grad for n in norms)


SMALL = (
    *("logger.mode=disabled", "trainer.accelerator=cpu", "eval.max_samples=3"),
    *("stream.prompt_length=40", "stream.answer_length=26", "trainer.max_epochs=1"),
    *("trainer.limit_train_batches=1", "alignment.samples=4", "alignment.batches=1"),
    *("batch_size=4", "checkpoint.enabled=false", "stream.prompt.layout=text"),
)


@needs_data
@pytest.mark.parametrize(
    ("strategy", "extra"),
    [
        ("rogo", ("model=t5_tiny", "strategy.samples=4", "strategy.relax_samples=4")),
        ("gpm", ("model=hub", "model.name_or_path={saved}/llama", "strategy.samples=4")),
        (
            "finetune",
            ("model=hub", "model.name_or_path={saved}/t5", "learner.label_likelihood=true"),
        ),
        ("finetune", ("model=gpt_tiny", "trainer.precision=bf16-mixed")),
        ("finetune", ("learner=seq2seq", "learner.gradient_checkpointing=true")),
    ],
)
def test_the_few_shot_stream_runs_offline(strategy, extra, cli, saved, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = [word.format(saved=saved) for word in extra]
    run = tmp_path / "run"
    status, _, error = cli(
        f"+strategy={strategy}", "+stream=t5_cl_fewshot", f"stream.data_dir={DATA}",
        *SMALL, *words, f"run_dir={run}",
    )  # fmt: skip
    assert status == 0, error
    events = read_results(run)
    evaluations = [e for e in events if e["event"] == "evaluation"]
    assert list(evaluations[-1]["scores"]) == ["dbpedia", "amazon", "yahoo", "agnews"]
    if "learner.label_likelihood=true" in words:
        assert 0 <= evaluations[-1]["details"]["agnews"]["label_likelihood"] <= 1
    data = json.loads((run / "data.json").read_text())
    assert data["tasks"][0]["metric"] == "exact_match"
    assert data["tasks"][3]["facts"]["majority"] == 0.25


@needs_data
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("model=t5_small",), "stream.tokenizer=google-t5/t5-small: no tokenizer"),
        (("model=hub",), "stream.tokenizer=null: name the pretrained model"),
        (("model=hub", "stream.tokenizer=bytes"), "model.name_or_path=null: name a folder"),
        (("model=t5_small", "stream.tokenizer=bytes"), "model.name_or_path=google-t5/t5-small: no"),
        (("learner=classifier",), "learner=language"),
        (("stream.order=4",), "stream.order=4: use 1, 2 or 3"),
        (("stream.data_dir=/nowhere",), "stream.data_dir=/nowhere: no such folder"),
        (("stream.prompt.task_tag=maybe",), "prompt.task_tag=maybe"),
    ],
)
def test_mistakes_are_one_line(words, message, cli, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = f"stream.data_dir={DATA}"
    status, _, error = cli("+strategy=finetune", "+stream=t5_cl_fewshot", data, *words)
    assert status == 2
    assert message in error
    assert "Traceback" not in error


@needs_data
def test_the_small_stream_divides_rows_anew_and_learns_tasks_about_equally_long():
    from cl_bench.tasks.t5_cl_small import SmallText

    stream = SmallText(str(DATA), train_samples=5000)
    assert [task.name for task in stream] == ["dbpedia", "agnews", "amazon", "yelp"]
    for task in stream:
        splits = {k: [(e.text, e.answer) for e in v] for k, v in task.splits.items()}
        assert len(splits["test"]) == 500
        assert not set(splits["train"]) & set(splits["test"])
        assert 27000 <= task.epochs * len(splits["train"]) < 27000 + len(splits["train"])
    assert not stream.task_id_at_test
    batch = whole(stream[0].validation)
    assert float((batch["input_ids"][batch["attention_mask"].bool()] == 2).double().mean()) < 0.25
