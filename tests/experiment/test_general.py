"""What a stream costs in general: a second matrix beside the run, and afterwards."""

import csv
import json
import sys

import pytest
import torch
from chats import said, saved, write

from cl_bench import run
from cl_bench.cli.general import general
from cl_bench.contracts import UsageError
from cl_bench.experiment import harness
from cl_bench.experiment.harness import TINY, Harness
from cl_bench.report.page import page_data
from cl_bench.report.study import read_study
from cl_bench.tasks.chat import Chat
from cl_bench.tracking.reading import read_run
from cl_bench.tracking.tables import general_changes


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(sys.modules["cl_bench.experiment.conduct"], "write_figures", lambda _: [])


def asked(tasks=TINY, limit=None):
    return Harness(tasks, None, limit, None, False, 8, "probe.general.")


def learn(tmp_path, *words, tasks=2):
    paths = [write(tmp_path / f"{n}.jsonl", [said("hi", n)] * 8) for n in "abc"[:tasks]]
    stream = Chat(paths, tokenizer=str(saved("llama")))
    small = (
        *("trainer.max_epochs=1", "trainer.accelerator=cpu", "logger.mode=disabled"),
        *("alignment.enabled=false", "optimizer=adamw", "optimizer.lr=0.01", "batch_size=4"),
        *("model=hub", f"model.name_or_path={saved('llama')}", "learner=language"),
    )
    return run(stream, "finetune", overrides=(*small, *words), run_dir=tmp_path / "run")


@pytest.fixture
def counted(monkeypatch):
    """In the harness' place: what the sum of the weights makes of each task's name."""

    def score(self, model, tokenizer):
        total = float(sum(p.double().abs().sum() for p in model.parameters()))
        assert tokenizer.chat_template
        assert not model.training
        return {name: (total * (i + 1)) % 1.0 for i, name in enumerate(self.tasks)}

    monkeypatch.setattr(harness.Harness, "check", lambda self: None)
    monkeypatch.setattr(harness.Harness, "score", score)


def test_the_second_matrix_stands_everywhere(tmp_path, counted):
    result = learn(tmp_path, "probe.general.enabled=true", "probe.general.tasks=[one,two]")
    rows = read_run(tmp_path / "run").general
    assert list(rows) == [0, 1, 2]
    with (tmp_path / "run" / "general.csv").open() as file:
        header, *lines = csv.reader(file)
    assert header == ["after_task", "one", "two"]
    assert [float(line[1]) for line in lines] == pytest.approx([r["one"] for r in rows.values()])
    one = result.summary["general"]["one"]
    assert one["change"] == pytest.approx(rows[2]["one"] - rows[0]["one"])
    page = page_data(read_study([tmp_path / "run"]), [tmp_path / "run"])
    shown = page["blocks"][0]["rows"][0]["general"]
    assert shown["learned"] == ["0", "1", "2", "change"]
    assert shown["scores"][-1][0] == pytest.approx(100 * one["change"], abs=0.1)


def test_it_is_measured_afterwards_too_and_no_bit_of_the_run_changes(tmp_path, counted, capsys):
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    plain.mkdir(), watched.mkdir()
    first = learn(plain)
    second = learn(watched, "probe.general.enabled=true", "probe.general.tasks=[one,two]")
    for name, weight in first.learner.state_dict().items():
        assert torch.equal(weight, second.learner.state_dict()[name])
    before = (plain / "run" / "results.jsonl").read_bytes()
    path = general([f"general={plain / 'run'}", "tasks=[one,two]"])
    afterwards, beside = (read_run(place / "run").general for place in (plain, watched))
    assert list(afterwards) == list(beside) == [0, 1, 2]
    for row, scores in afterwards.items():
        assert scores == pytest.approx(beside[row])
    assert (plain / "run" / "results.jsonl").read_bytes() == before
    assert "in general (%)" in capsys.readouterr().out
    told = json.loads(path.read_text())
    del told["rows"]["2"]
    told["rows"]["1"] = {"one": 0.25, "two": 0.5}
    path.write_text(json.dumps(told))  # as a call that was stopped leaves it
    general([f"general={plain / 'run'}", "tasks=[one,two]"])
    rows = read_run(plain / "run").general
    assert rows[1] == {"one": 0.25, "two": 0.5}  # not asked again
    assert 2 in rows
    with pytest.raises(UsageError, match=r"task=\[a\]: general=.* takes tasks.* Did you mean"):
        general([f"general={plain / 'run'}", "task=[a]"])


def test_changes_are_between_the_first_row_and_the_last():
    rows = {0: {"a": 0.5, "b": 0.25}, 1: {"a": 0.75, "b": None}, 2: {"a": 0.25, "b": None}}
    assert general_changes(rows) == {
        "a": {"start": 0.5, "end": 0.25, "change": -0.25},
        "b": {"start": 0.25, "end": None, "change": None},
    }


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UsageError, match=r"pip install 'cl_bench\[general\]'"):
        asked().check()


def test_the_bundled_tasks_are_scored_by_the_harness(tmp_path):
    pytest.importorskip("lm_eval")
    with pytest.raises(
        UsageError, match=r"cl_bench_fact: the harness has no such task\. Did you m"
    ):
        asked(tasks=("cl_bench_fact",)).check()
    asked().check()
    import chats

    model, words = chats.model("llama", 261).eval(), chats.tokenizer("llama")
    scores = asked(limit=4).score(model, words)
    assert list(scores) == list(TINY)
    assert all(0 <= s <= 1 for s in scores.values())
    # A choice is the likeliest text behind the question: by hand for the first four.
    lines = (harness.BUNDLED / "facts.jsonl").read_text().splitlines()
    hits = []
    for row in map(json.loads, lines[:4]):
        prompt = words(f"Question: {row['question']}\nAnswer:")["input_ids"]
        sums = []
        for choice in row["choices"]:
            answer = words(f" {choice}", add_special_tokens=False)["input_ids"]
            logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(1)
            sums.append(sum(float(logits[len(prompt) + j - 1, t]) for j, t in enumerate(answer)))
        hits.append(row["choices"][sums.index(max(sums))] == row["answer"])
    assert scores["cl_bench_facts"] == sum(hits) / 4
