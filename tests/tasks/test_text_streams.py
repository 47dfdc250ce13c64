"""Streams of prompts from files: wording, orders, what is read and what is refused."""

import gzip
import itertools
import json

import pytest
import torch
from conftest import DATA_AT_HAND
from texts import make_stream

from cl_bench.contracts import UsageError
from cl_bench.metrics.answers import normalised
from cl_bench.metrics.answers.verbatim import verbatim
from cl_bench.tasks.t5_cl_hub import HUB, HubText
from cl_bench.tasks.text import Prompt
from cl_bench.tasks.text.benchmark import COMPLETE, ORDERS, SOURCES, digest, places, read_rows
from cl_bench.tasks.text.codec import WordCodec
from cl_bench.tasks.text.pinned import PINNED

transformers = pytest.importorskip("transformers")

DATA = DATA_AT_HAND / "cl_benchmark"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no {DATA}")


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
