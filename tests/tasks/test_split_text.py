"""Labelled texts, some classes a task: files, splits, tokens, and a run on them."""

import gzip
import json

import pytest
import torch

from cl_bench.contracts import UsageError
from cl_bench.features import FeatureStream, TextBackbone
from cl_bench.models import MiniLM
from cl_bench.tasks.split_text import SplitText
from cl_bench.tasks.text.tokens import load_tokens

TOPICS = ("animal", "building", "plant", "village")


def rows(count, offset=0):
    return [
        {"sentence": f"{topic} number {i + offset}", "label": topic}
        for i in range(count)
        for topic in TOPICS
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("texts")
    lines = "".join(json.dumps(row) + "\n" for row in rows(10))
    (root / "train.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (root / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(4, 100)))
    return root


def stream_of(folder, **options):
    return SplitText(data_dir=str(folder), **{"text_column": "sentence", "length": 24, **options})


def test_tasks_hold_their_classes_as_tokens(folder):
    stream = stream_of(folder, validation_fraction=0.0)
    assert (stream.modality, stream.input_shape, stream.heads) == ("tokens", (24,), [2, 2])
    assert [t.name for t in stream] == ["animal+building", "plant+village"]
    task = stream[1]
    batch = task.train[torch.arange(20)]
    assert batch["x"].dtype == torch.int64
    texts = [row["sentence"] for row in rows(10) if row["label"] in TOPICS[2:]]
    assert torch.equal(batch["x"], load_tokens("bytes", "")(texts, 24))
    assert batch["y"].tolist() == [2, 3] * 10
    assert len(task.test) == 8
    stored = task.stored("test")
    assert stored.samples[stored.rows[:1]] == ["plant number 100"]


def test_without_a_test_split_one_is_taken_out(folder):
    stream = stream_of(folder, test=None, test_fraction=0.3, validation_fraction=0.0)
    for task in stream:
        assert (len(task.train), len(task.test)) == (14, 6)
        train, test = (task.stored(side) for side in ("train", "test"))
        seen = set(train.samples[train.rows]) & set(test.samples[test.rows])
        assert not seen
    again = stream_of(folder, test=None, test_fraction=0.3, validation_fraction=0.0)
    other = stream_of(folder, test=None, test_fraction=0.3, split_seed=1, validation_fraction=0.0)
    assert stream.fingerprint == again.fingerprint != other.fingerprint


def test_increments_orders_and_limits(folder):
    stream = stream_of(
        folder, first_classes=2, classes_per_task=1, class_order="random", train_per_class=5,
        test_per_class=2, validation_fraction=0.2, order_seed=3,
    )  # fmt: skip
    assert stream.heads == [2, 1, 1]
    assert [len(t.train) for t in stream] == [8, 4, 4]
    assert [len(t.validation) for t in stream] == [2, 1, 1]
    assert [len(t.test) for t in stream] == [4, 2, 2]
    told = [n for t in stream for n in t.facts["class_names"]]
    assert sorted(told) == list(TOPICS)
    assert told != list(TOPICS)


def test_parquet_with_named_classes(tmp_path):
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    for split, labels in (("train", [1, 0, 1, 0]), ("test", [0, 1])):
        texts = [f"{split} {i}" for i in range(len(labels))]
        made = datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)
        made.to_parquet(tmp_path / f"{split}.parquet")
    stream = SplitText(data_dir=str(tmp_path), validation_fraction=0.0)
    assert stream[0].name == "no+yes"
    assert stream[0].train[torch.arange(4)]["y"].tolist() == [1, 0, 1, 0]


def test_what_is_wrong_is_said(folder, tmp_path):
    with pytest.raises(UsageError, match=r"stream.data_dir=null: name a folder"):
        SplitText()
    with pytest.raises(UsageError, match=r"stream.train=other\*: no such file .*test.jsonl"):
        stream_of(folder, train="other*")
    with pytest.raises(UsageError, match=r"not lines of {text, label}"):
        stream_of(folder, text_column="text")
    with pytest.raises(UsageError, match=r"stream.scenario=task: tasks have \[1, 1, 1, 1\]"):
        stream_of(folder, classes_per_task=1, scenario="task")
    with pytest.raises(UsageError, match=r"stream.tokenizer=nowhere: no tokenizer"):
        stream_of(folder, tokenizer="nowhere")
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n')
    (tmp_path / "test.jsonl").write_text('{"text": "a", "label": 2}\n')
    with pytest.raises(UsageError, match="2 is no class of the training data"):
        SplitText(data_dir=str(tmp_path))


def network():
    torch.manual_seed(0)
    return MiniLM(1, 8, 2, 258, 32)


def test_features_of_texts(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("CL_BENCH_CACHE", str(tmp_path))
    made = TextBackbone(network(), tokenizer="bytes", length=24)
    plain = stream_of(folder)
    stream = FeatureStream(plain, made, lambda line: None)
    batch, tokens = (s[1].test[torch.arange(8)] for s in (stream, plain))
    with torch.no_grad():
        torch.testing.assert_close(batch["x"], made.network(tokens["x"]))
    assert torch.equal(batch["y"], tokens["y"])
    assert stream.input_dtype == torch.float32


def test_a_classifier_learns_texts(cli, folder):
    words = [
        "+stream=split_text",
        f"stream.data_dir={folder}",
        "stream.text_column=sentence",
        "stream.length=24",
        "model.width=16",
        "model.depth=1",
        "trainer.max_epochs=8",
        "optimizer.lr=0.01",
        "batch_size=8",
        "logger.mode=disabled",
        "run_dir=out",
    ]
    status, _, error = cli("+strategy=joint", *words)
    assert status == 0, error
    summary = json.loads(open("out/summary.json").read())  # noqa: SIM115
    assert summary["acc"] == 1
    data = json.loads(open("out/data.json").read())  # noqa: SIM115
    assert data["tasks"][0]["facts"]["class_names"] == ["animal", "building"]
    status, _, error = cli("export=out")
    assert status == 0, error
    network = torch.export.load("out/export/task0002/network.pt2").module()
    logits = network(load_tokens("bytes", "")(["a plant number 3"], 24))
    assert logits.shape == (1, 4)


def test_every_corpus_says_its_own_licence():
    from cl_bench.tasks.text.benchmark import origin_of

    news, stars = (origin_of(name, "here") for name in ("agnews", "amazon"))
    assert news.licence.startswith("research and other non-commercial use (AG's corpus)")
    assert stars.licence.startswith("amazon: terms of its own")
    assert news.source == stars.source == "here"
