"""What is kept beside the tasks: loss on general text, and the part of updates left unprotected."""

import functools
import gzip
import json
import math

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning import Trainer
from probing import CASES, NOTHING, run
from texts import prompts
from torch.optim import AdamW

from cl_bench.contracts import IGNORE, Protect, UsageError
from cl_bench.experiment import (
    AlignmentSettings,
    CheckpointSettings,
    EvalSettings,
    Identity,
    LoopSettings,
    ProbeSettings,
    conduct,
)
from cl_bench.experiment.probes.general_text import GeneralText, GeneralTextSettings
from cl_bench.experiment.probes.held_out import continuation, read_texts, span_corruption, windows
from cl_bench.experiment.probes.unprotected import UnprotectedSettings
from cl_bench.experiment.weights import TaskWeights, read_weights
from cl_bench.learners import language
from cl_bench.metrics import unprotected_by_chance, unprotected_share
from cl_bench.models import gpt, t5
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.tasks.text.codec import PretrainedCodec
from cl_bench.tracking import read_results
from runs import differences, final_weights

transformers = pytest.importorskip("transformers")

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}

# -- the unprotected share of an update ---------------------------------------------------------


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SHAPES = st.tuples(st.integers(2, 9), st.integers(2, 9))


@given(st.integers(0, 500), SHAPES, st.floats(0, 1))
def test_it_is_what_both_projectors_of_the_decomposition_leave(seed, shape, ratio):
    W, D = draw(seed, *shape), draw(seed + 1, *shape)
    k = math.floor(ratio * min(shape) + 1e-9)
    U, _, Vh = torch.linalg.svd(W)
    left = torch.eye(shape[0], dtype=D.dtype) - U[:, :k] @ U[:, :k].t()
    right = torch.eye(shape[1], dtype=D.dtype) - Vh[:k].t() @ Vh[:k]
    expected = float((left @ D @ right).norm() / D.norm())
    assert unprotected_share(D, W, ratio) == pytest.approx(expected, abs=1e-6)


@given(st.integers(0, 500), SHAPES)
def test_rotations_and_transposition_do_not_change_it(seed, shape):
    W, D = draw(seed, *shape), draw(seed + 1, *shape)
    Q = torch.linalg.qr(draw(seed + 2, shape[0], shape[0])).Q
    R = torch.linalg.qr(draw(seed + 3, shape[1], shape[1])).Q
    share = unprotected_share(D, W, 0.5)
    assert unprotected_share(Q @ D @ R, Q @ W @ R, 0.5) == pytest.approx(share, abs=1e-6)
    assert unprotected_share(D.t(), W.t(), 0.5) == pytest.approx(share, abs=1e-6)
    assert unprotected_share(3 * D, 2 * W, 0.5) == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize("shape", [(8, 6), (6, 8), (7, 7)])
def test_blocks_of_the_decomposition(shape):
    W = draw(0, *shape)
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    k = 3
    high, low = slice(0, k), slice(k, None)

    def block(rows, columns):
        core = draw(1, U[:, rows].shape[1], Vh[columns].shape[0])
        return U[:, rows] @ core @ Vh[columns]

    ratio = k / min(shape)
    assert unprotected_share(block(low, low), W, ratio) == pytest.approx(1)
    for rows, columns in ((high, high), (high, low), (low, high)):
        assert unprotected_share(block(rows, columns), W, ratio) == pytest.approx(0, abs=1e-7)
    assert unprotected_share(W, W, 0.0) == pytest.approx(1)
    assert math.isnan(unprotected_share(0 * W, W, 0.5))


def test_chance_is_what_random_updates_have():
    W = draw(0, 12, 8)
    squares = [unprotected_share(draw(i, 12, 8), W, 0.5) ** 2 for i in range(1, 400)]
    assert sum(squares) / len(squares) == pytest.approx(
        unprotected_by_chance(12, 8, 0.5) ** 2, rel=0.05
    )
    assert unprotected_by_chance(12, 8, 0.5) ** 2 == pytest.approx((1 - 4 / 12) * (1 - 4 / 8))


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("case", ["finetune", "gpm", "trgp", "ewc", "task_vector"])
def test_every_strategy_is_measured_and_none_is_changed(tmp_path, case):
    probe = ProbeSettings(unprotected=UnprotectedSettings(True, 0.4))
    options = {"evaluation": EvalSettings(), **CASES[case]}
    run(tmp_path / "plain", probe=NOTHING, **options)
    _, learner = run(tmp_path / "probed", probe=probe, **options)
    plain, probed = (
        {k: v for k, v in final_weights(tmp_path / d).items() if not k.startswith("/observer")}
        for d in ("plain", "probed")
    )
    assert plain == probed
    layers = [e["layers"] for e in read_results(tmp_path / "probed") if e["event"] == "layers"]
    kept = [read_weights(TaskWeights(tmp_path / "probed").path(i)) for i in range(4)]
    for t, found in enumerate(layers):
        for layer in learner.layers(Protect(bias="free")):
            before, after = kept[t][f"{layer.name}.weight"], kept[t + 1][f"{layer.name}.weight"]
            value, chance = (found[layer.name][k] for k in ("unprotected", "unprotected_chance"))
            if torch.equal(before, after):
                assert value is None
                continue
            assert value == pytest.approx(unprotected_share(after - before, after, 0.4), rel=1e-5)
            assert chance == pytest.approx(unprotected_by_chance(*after.shape, 0.4))
    costs = [e for e in read_results(tmp_path / "probed") if e.get("probe") == "cost"]
    assert all(e["seconds"]["unprotected"] > 0 for e in costs)


# -- general text: where it comes from ----------------------------------------------------------


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".jsonl.gz"])
def test_files_are_read(tmp_path, ending):
    path = tmp_path / f"held_out{ending}"
    texts = ["Erste Zeile.\nüber zwei", "another"]
    content = (
        "\n".join(texts)
        if ending == ".txt"
        else "\n".join(json.dumps({"content": text}) for text in texts)
    )
    raw = content.encode()
    path.write_bytes(gzip.compress(raw) if ending.endswith(".gz") else raw)
    found = read_texts(GeneralTextSettings(path=str(path), field="content"))
    assert found == (["\n".join(texts)] if ending == ".txt" else texts)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"a", r"ends in \.txt, \.jsonl, \.jsonl\.gz"),
        ("gone.txt", None, "cannot be read"),
        ("a.txt", b" \n", "there is no text"),
        ("a.txt", b"\xff\xfe", "cannot be read"),
        ("a.jsonl", b"{", "cannot be read"),
        ("a.jsonl", b'{"body": "x"}', r"probe\.general_text\.field="),
        ("a.jsonl", b'["x"]', r"probe\.general_text\.field="),
        ("a.jsonl.gz", b"no archive", "cannot be read"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=words):
        read_texts(GeneralTextSettings(path=str(tmp_path / name)))


def test_the_hub_is_asked_for_a_split(monkeypatch):
    asked = []

    def load(*arguments, **options):
        asked.append((arguments, options))
        return datasets.Dataset.from_dict({"text": ["one", "", "two"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    settings = GeneralTextSettings(dataset="Salesforce/wikitext", subset="wikitext-2-raw-v1")
    assert read_texts(settings) == ["one", "two"]
    assert asked == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test"})]
    assert settings.source == "Salesforce/wikitext/wikitext-2-raw-v1/test"
    with pytest.raises(UsageError, match="is one of text"):
        read_texts(GeneralTextSettings(dataset="x", field="body"))

    def fail(*_, **__):
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UsageError, match=r"no route\).*probe\.general_text\.path="):
        read_texts(settings)


def test_the_package_has_text_of_its_own():
    texts = read_texts(GeneralTextSettings())
    assert len(texts) == 12
    assert sum(len(text.encode()) for text in texts) > 50 * 128


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"windows": 0}, "windows=0"),
        ({"length": 4}, "length=4"),
        ({"objective": "mlm"}, "objective=mlm"),
        ({"path": "a.txt", "dataset": "b"}, "give one of them"),
    ],
)
def test_settings_of_the_text_are_checked(options, words):
    with pytest.raises(UsageError, match=words):
        GeneralTextSettings(**options)


def test_settings_of_the_share_are_checked():
    with pytest.raises(UsageError, match=r"preserve_ratio=1\.0"):
        UnprotectedSettings(preserve_ratio=1.0)


# -- general text: batches ----------------------------------------------------------------------

END = 1


@given(
    st.lists(st.lists(st.integers(2, 99), max_size=30), max_size=6),
    st.integers(2, 8),
    st.integers(1, 9),
)
def test_windows_are_pieces_of_the_joined_text_in_order(documents, length, most):
    joined = [token for text in documents for token in (*text, END)]
    found = windows(documents, END, length, most)
    possible = len(joined) // length
    assert found.shape == (min(most, possible), length)
    places = [i * possible // most for i in range(most)] if possible > most else range(possible)
    expected = [joined[p * length : (p + 1) * length] for p in places]
    assert found.tolist() == expected
    assert len(set(places)) == len(places)


def test_continuations_keep_every_token_once():
    tokens = torch.arange(2, 22).reshape(2, 10)
    batch = continuation(tokens, 4)
    assert torch.equal(torch.cat([batch["input_ids"], batch["labels"]], 1), tokens)
    assert batch["attention_mask"].all()
    assert (batch["labels"] != IGNORE).all()


@given(st.integers(8, 200), st.integers(1, 4))
def test_gaps_filled_in_give_the_text_back(length, n):
    sentinels = [1000 - i for i in range(60)]
    tokens = torch.randint(2, 900, (n, length), generator=torch.Generator().manual_seed(length))
    batch = span_corruption(tokens, sentinels, END)
    left_out = max(1, round(0.15 * length))
    gaps = max(1, round(left_out / 3))
    assert batch["labels"].shape == (n, left_out + gaps + 1)
    assert batch["input_ids"].shape == (n, length - left_out + gaps)
    again = span_corruption(tokens, sentinels, END)
    assert torch.equal(again["input_ids"], batch["input_ids"])
    for row, prompt, answer in zip(tokens, batch["input_ids"], batch["labels"], strict=True):
        *answer, end = answer.tolist()
        assert end == END
        fills, current = {}, None
        for token in answer:
            if token in sentinels:
                current = fills.setdefault(token, [])
            else:
                current.append(token)
        assert list(fills) == sentinels[:gaps]
        assert all(fills.values())
        rebuilt = [t for token in prompt.tolist() for t in fills.get(token, [token])]
        assert rebuilt == row.tolist()
        assert prompt[0] not in sentinels


# -- general text: a run --------------------------------------------------------------------------


def model(kind, size=259):
    torch.manual_seed(1)
    if kind == "t5":
        return t5(size, depth=1, width=16, heads=2, feed_forward=32, tied=False)
    return gpt(size, kind, depth=1, width=16, heads=2, context=64)


class Killed(BaseException):
    """The process is gone."""


def learned(directory, kind, settings, dies_at=None, resume=False, stream=None, network=None):
    stream = stream or prompts()
    network = model(kind) if network is None else network
    learner = language(stream, network, functools.partial(AdamW, lr=1e-2), 8, 0)
    batches = iter(range(10**9))
    plain = learner._learn

    def mortal(batch):
        if next(batches) == dies_at:
            raise Killed
        return plain(batch)

    learner._learn = mortal
    conduct(
        stream,
        Finetune(),
        learner,
        functools.partial(Trainer, max_epochs=1, **QUIET),
        Identity("stories", "finetune", "seed: 0\n", "python -m cl_bench"),
        loop=LoopSettings(0, 8),
        evaluation=EvalSettings(batch_size=5, max_samples=4),
        alignment=AlignmentSettings(enabled=False),
        probe=ProbeSettings(general_text=settings),
        checkpoint=CheckpointSettings(True, 2, 2),
        run_dir=directory,
        resume=resume,
    )
    return learner


def of_text(directory):
    return [e for e in read_results(directory) if e.get("probe") == "general_text"]


TEXT = "It was a bright cold day in some month, and the clocks had nothing to say. " * 4


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("kind", ["t5", "gpt_neox"])
def test_the_loss_is_what_transformers_says_before_and_after_every_task(tmp_path, kind):
    (tmp_path / "text.txt").write_text(TEXT)
    settings = GeneralTextSettings(True, path=str(tmp_path / "text.txt"), windows=8, length=20)
    learner = learned(tmp_path / "run", kind, settings)
    codec = learner.prompts.codec
    tokens = windows([codec.encode(TEXT)], codec.end, 20, 8)
    whole = model(kind).eval()

    def loss(weights):
        parts = {"backbone": {}, "heads.0": {}}
        for name, tensor in weights.items():
            part = next(p for p in parts if name.startswith(f"{p}."))
            parts[part][name.removeprefix(f"{part}.")] = tensor
        whole.get_output_embeddings().load_state_dict(parts["heads.0"])
        target = whole if kind == "t5" else whole.base_model
        target.load_state_dict(parts["backbone"], strict=False)
        with torch.no_grad():
            if kind != "t5":
                return float(whole(input_ids=tokens, labels=tokens).loss)
            closing = torch.tensor([list(codec.closing)] * len(tokens))
            given = torch.cat([tokens[:, :10], closing], 1)
            return float(whole(input_ids=given, labels=tokens[:, 10:].contiguous()).loss)

    kept = [loss(read_weights(TaskWeights(tmp_path / "run").path(i))) for i in range(3)]
    assert max(kept) - min(kept) > 0.01
    for t, event in enumerate(of_text(tmp_path / "run")):
        values = event["values"]
        assert values["before"] == pytest.approx(kept[t], rel=1e-5)
        assert values["after"] == pytest.approx(kept[t + 1], rel=1e-5)
        assert values["change"] == pytest.approx(kept[t + 1] - kept[t], abs=1e-5)
        assert values["since_start"] == pytest.approx(kept[t + 1] - kept[0], abs=1e-5)
        assert event["objective"] == "continuation"
        assert event["source"].endswith("text.txt")
        assert event["windows"] == len(tokens) == 8
        assert event["tokens"] == 8 * (10 if kind == "t5" else 19)


@pytest.mark.usefixtures("no_pictures")
def test_it_changes_no_bit_costs_little_and_is_resumed_exactly(tmp_path):
    settings = GeneralTextSettings(True, windows=3, length=16)
    learned(tmp_path / "plain", "t5", GeneralTextSettings())
    learned(tmp_path / "whole", "t5", settings)
    plain, probed = (
        {k: v for k, v in final_weights(tmp_path / d).items() if not k.startswith("/observer")}
        for d in ("plain", "whole")
    )
    assert plain == probed
    costs = [e for e in read_results(tmp_path / "whole") if e.get("probe") == "cost"]
    assert all(e["seconds"]["general_text"] > 0 for e in costs)
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["probe_seconds"]["general_text"] > 0
    with pytest.raises(Killed):
        learned(tmp_path / "killed", "t5", settings, dies_at=5)
    learned(tmp_path / "killed", "t5", settings, resume=True)
    assert differences(tmp_path / "whole", tmp_path / "killed") == []


@pytest.mark.usefixtures("no_pictures")
def test_an_encoder_decoder_with_sentinels_is_asked_for_gaps(tmp_path):
    stream = prompts()
    stream.codec = PretrainedCodec(transformers.ByT5Tokenizer(), "bytes with sentinels")
    sizes = {"network": model("t5", 384), "stream": stream}
    learned(tmp_path, "t5", GeneralTextSettings(True, windows=4, length=40), **sizes)
    assert [e["objective"] for e in of_text(tmp_path)] == ["span_corruption"] * 2
    assert all(e["tokens"] == 4 * (6 + 2 + 1) for e in of_text(tmp_path))


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("gpt_neox", {"length": 65}, r"length=65: the model has 64 positions"),
        ("gpt_neox", {"objective": "span_corruption"}, "needs an encoder-decoder"),
        ("t5", {"objective": "span_corruption"}, r"this one has 0\)"),
        ("t5", {"length": 100_000}, "fewer than one window"),
    ],
)
def test_what_the_model_cannot_read_is_refused(kind, options, words):
    settings = GeneralTextSettings(True, **{"length": 32, **options})
    stream = prompts()
    learner = language(stream, model(kind), functools.partial(AdamW, lr=1e-2), 8, 0)
    with pytest.raises(UsageError, match=words):
        GeneralText(settings, 8, stream, learner, None)


def test_streams_without_a_tokenizer_are_refused(tmp_path):
    probe = ProbeSettings(general_text=GeneralTextSettings(True))
    with pytest.raises(UsageError, match=r"stream 'toy' has no tokenizer.*t5_cl_fewshot"):
        run(tmp_path, probe=probe, evaluation=EvalSettings())
