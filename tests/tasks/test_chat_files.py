"""Files that no run can learn from: one line each, with file and row, before anything starts."""

import gzip
import json

import chats
import pytest
import torch
from chats import said, saved, write

from cl_bench.contracts import UsageError
from cl_bench.experiment import SearchSettings
from cl_bench.experiment.search import for_search
from cl_bench.tasks.chat import Chat

GOOD = [{"prompt": "hi", "completion": "yo"}] * 4


def lines(*objects):
    return "".join((o if isinstance(o, str) else json.dumps(o)) + "\n" for o in objects).encode()


def turns(*messages):
    return {"messages": [dict(zip(("role", "content"), m, strict=False)) for m in messages]}


BAD = {
    "is empty": (b"", "a.jsonl: holds no rows"),
    "has no rows": (b"\n\n", "a.jsonl: holds no rows"),
    "is no JSON": (lines(*GOOD, "{'prompt': 1}"), "a.jsonl: row 5: no JSON"),
    "ends early": (lines(*GOOD) + b'{"prompt": "hi", "comp', "a.jsonl: row 5: no JSON"),
    "is a list": (lines(*GOOD, [1, 2]), "a.jsonl: row 5: list, not a JSON object"),
    "is no text": (lines(*GOOD, {"prompt": 3, "completion": "x"}), "row 5: prompt is int"),
    "has unknown keys": (lines({"question": "a", "reply": "b"}), "row 1: has question, reply"),
    "lacks a key": (lines(*GOOD, {"prompt": "hi"}), "row 5: lacks completion"),
    "mixes forms": (lines(*GOOD, said("hi", "yo")), "row 5: lacks prompt, completion"),
    "has an empty answer": (lines(*GOOD, {"prompt": "a", "completion": " "}), "row 5: its answer"),
    "has a null": (lines(*GOOD, {"prompt": "a", "completion": None}), "row 5: completion is miss"),
    "has NaN": (lines(*GOOD, '{"prompt": "a", "completion": NaN}'), "row 5: NaN is no value"),
    "is Latin-1": (lines(*GOOD) + '{"prompt": "é"}'.encode("latin-1"), "row 5: not UTF-8"),
    "has a line of 100 MB": (
        lines(*GOOD) + b'{"prompt": "' + b"x" * 100_000_000 + b'"}\n',
        "row 5: longer than 16 MB",
    ),
    "has no turns": (lines({"messages": []}), "row 1: messages is empty"),
    "has a wrong role": (
        lines(said("a", "b"), turns(("human", "a"), ("assistant", "b"))),
        "row 2: turn 1: there is no role 'human'; use system, developer, user, assistant, tool",
    ),
    "has a turn without a role": (lines({"messages": [{"content": "a"}]}), "turn 1: role is missi"),
    "has parts for content": (
        lines({"messages": [{"role": "user", "content": [{"type": "image"}]}]}),
        "row 1: turn 1: content is list, not a text",
    ),
    "has a silent turn": (
        lines(turns(("user", "a"), ("assistant", ""), ("user", "b"), ("assistant", "c"))),
        "row 1: turn 2: its answer is empty",
    ),
    "ends with a question": (lines(said("a", "b", "c")), "row 1: ends with a turn of 'user'"),
    "breaks the template": (
        lines(*[said("a", "b")] * 4, turns(("user", "a"), ("user", "b"), ("assistant", "c"))),
        "row 5: the chat template refuses it (roles must alternate",
    ),
    "has one row": (lines(GOOD[0]), "row 1: too few rows"),
    "answers what is no choice": (
        lines(*[{**GOOD[0], "choices": ["yo", "no"]}] * 4, {**GOOD[0], "choices": ["a", "b"]}),
        "row 5: its answer 'yo' is none of its choices",
    ),
    "has one choice": (lines({**GOOD[0], "choices": ["yo"]}), "row 1: choices is list; give two"),
}


def refused(tmp_path, source, **options):
    options = {"tokenizer": str(saved("gemma3")), **options}
    with pytest.raises(UsageError) as caught:
        Chat([source], **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


@pytest.mark.parametrize("what", BAD)
def test_a_file_that(what, tmp_path):
    content, wanted = BAD[what]
    (tmp_path / "a.jsonl").write_bytes(content)
    message = refused(tmp_path, str(tmp_path / "a.jsonl"))
    assert wanted in message
    assert str(tmp_path / "a.jsonl") in message


def test_files_that_are_no_files(tmp_path):
    assert "a.jsonl: no such file" in refused(tmp_path, str(tmp_path / "a.jsonl"))
    (tmp_path / "a.txt").write_text("hi")
    assert "not one of .jsonl" in refused(tmp_path, str(tmp_path / "a.txt"))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 or not")
    assert "b.parquet: no parquet file" in refused(tmp_path, str(tmp_path / "b.parquet"))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines(*GOOD))[:-9])
    assert "row 5: cannot be read" in refused(tmp_path, str(tmp_path / "c.jsonl.gz"))
    (tmp_path / "empty").mkdir()
    assert "there are no files" in refused(tmp_path, str(tmp_path / "empty"))
    (tmp_path / "half").mkdir()
    write(tmp_path / "half" / "test.jsonl", GOOD)
    assert "no file is called train*" in refused(tmp_path, str(tmp_path / "half"))


def test_options_that_are_wrong(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = write(tmp_path / "a.jsonl", GOOD)
    for options, wanted in (
        (
            {"metric": "exactmatch"},
            "stream.metric=exactmatch: there is no such metric. Did you mea",
        ),
        ({"prompt": "{q}"}, "give both templates"),
        ({"prompt": "{q}", "answer": "{a}"}, "row 1: has no column 'q'"),
        ({"prompt": "{q", "answer": "{a}"}, "stream.data[0].prompt={q: "),
        ({"chat_template": "nowhere.jinja"}, "stream.chat_template=nowhere.jinja: cannot be read"),
        ({"metric": "choice_likelihood", "split_seed": 1}, "1 different answers"),
        ({"max_length": 0}, "stream.max_length=0: at least 8"),
    ):
        assert wanted in refused(tmp_path, path, **options)
    long = write(tmp_path / "long.jsonl", [{"prompt": "hi", "completion": "yo " * 20}] * 4)
    assert "leaves no place for a prompt" in refused(tmp_path, long, max_length=8)
    for source, wanted in (
        ({"path": path, "epoch": 3}, "stream.data[0].epoch=3: no option. Did you mean epochs?"),
        ({"path": path, "epochs": 0}, "stream.data[0].epochs=0"),
        ({"path": path, "metric": "blue"}, "stream.data[0].metric=blue: there is no such metric"),
        ({"name": "x"}, "stream.data[0].path=null"),
        ({"path": path, "split": "dev"}, "stream.data[0].split=dev: a file has no splits"),
    ):
        assert wanted in refused(tmp_path, source)
    with pytest.raises(UsageError, match="two tasks are called"):
        Chat([path, path], tokenizer=str(saved("gemma3")))
    with pytest.raises(UsageError, match="has no chat template; name one"):
        Chat([write(tmp_path / "m.jsonl", [said("a", "b")] * 4)], tokenizer="bytes")


def texts(task, side="train"):
    return sorted(e.answer for e in task.splits[side])


def test_every_task_has_its_own_rows_and_options(tmp_path):
    import datasets

    folder = tmp_path / "sides"
    folder.mkdir()
    for side, n in (("train", 5), ("validation", 2), ("test", 3)):
        write(
            folder / f"{side}.jsonl",
            [{"prompt": "q", "completion": f"{side}{i}"} for i in range(n)],
        )
    labels = datasets.Features({"text": datasets.Value("string"),
                                "label": datasets.ClassLabel(names=["Bad", "Good"])})  # fmt: skip
    rows = {"text": [f"t{i}" for i in range(20)], "label": [i % 2 for i in range(20)]}
    datasets.Dataset.from_dict(rows, features=labels).to_parquet(tmp_path / "news.parquet")
    stream = Chat(
        [
            str(folder),
            {"path": str(tmp_path / "news.parquet"), "prompt": "Is {text} good?", "epochs": 3,
             "answer": "{label}", "metric": "choice_likelihood", "limit": 7, "name": "news"},
        ],
        tokenizer="bytes",
        metric="f1",
    )  # fmt: skip
    sides, news = stream
    assert texts(sides) == [f"train{i}" for i in range(5)]
    assert texts(sides, "test") == [f"test{i}" for i in range(3)]
    assert texts(sides, "validation") == ["validation0", "validation1"]
    assert (sides.name, sides.metric, sides.epochs) == ("sides", "f1", None)
    assert (news.name, news.metric, news.epochs) == ("news", "choice_likelihood", 3)
    assert news.labels == ("Bad", "Good")
    assert [len(news.splits[s]) for s in ("train", "validation", "test")] == [7, 1, 2]
    assert news.splits["test"][0].prompt.startswith("Is t")
    # No row is in two sides, and the same seed divides the same way.
    used = [e.prompt for part in news.splits.values() for e in part]
    assert len(set(used)) == len(used)
    batch = torch.arange(2)
    assert stream[0].train[batch]["labels"].shape == stream[1].train[batch]["labels"].shape


def test_rows_in_python_are_rows_of_files(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD)
    files, given = (
        Chat([source], tokenizer=str(saved("llama")))
        for source in ({"path": path, "name": "x"}, {"rows": GOOD, "name": "x"})
    )
    assert files.fingerprint == given.fingerprint
    assert chats.tokenizer("llama").eos_token_id != files.end  # a turn's end, not a text's


def test_a_search_has_no_number_to_choose_by_where_metrics_differ(tmp_path):
    rows = [{"prompt": f"q{i}", "completion": "a"} for i in range(20)]
    sources = [{"rows": rows, "name": n, "metric": m} for n, m in (("x", "f1"), ("y", "test_loss"))]
    stream = Chat(sources, tokenizer="bytes")
    with pytest.raises(UsageError, match=r"the tasks' metrics differ \(f1, test_loss\)"):
        for_search(stream, SearchSettings(enabled=True, tasks=2))
    assert len(for_search(stream, SearchSettings(enabled=True, tasks=1))) == 1


def test_ids_on_the_hub_may_have_points(monkeypatch):
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda *words: asked.append(words) or {})
    with pytest.raises(UsageError, match="no such file or folder, and as a data set on the hub"):
        Chat(["org/Name-2.5"], tokenizer="bytes")
    assert asked == [("org/Name-2.5", None)]
