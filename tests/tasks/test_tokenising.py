"""Tokens are made once and kept; whatever they follow from makes others."""

import pytest
import torch
from chats import said, saved, write

from cl_bench.contracts import UsageError
from cl_bench.tasks.chat import Chat
from cl_bench.tasks.conversations.rendering import ChatCodec
from cl_bench.tasks.text import tokenising
from cl_bench.tasks.text.codec import PretrainedCodec, load_tokenizer
from cl_bench.tasks.text.task import Example, PromptData

ROWS = [said(f"hi {i}", "yo", "so", f"ok {i}") for i in range(6)]


@pytest.fixture(autouse=True)
def keeping(tmp_path, monkeypatch):
    monkeypatch.setenv("CL_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokenising, "LEAST", 1)


@pytest.fixture
def rendered(monkeypatch):
    """Conversations that were rendered, one by one."""
    found, inner = [], ChatCodec.render
    monkeypatch.setattr(
        ChatCodec,
        "render",
        lambda self, row, turns: (found.append(row), inner(self, row, turns))[1],
    )
    return found


def chat(tmp_path, rows=ROWS, family="llama", **options):
    return Chat([write(tmp_path / "rows.jsonl", rows)], str(saved(family)), **options)


def batches(stream):
    return [data[torch.arange(len(data))] for data in (stream[0].train, stream[0].test)]


def test_conversations_are_rendered_once(tmp_path, rendered, monkeypatch):
    first = batches(chat(tmp_path))
    assert len(rendered) == len(ROWS)
    again = batches(chat(tmp_path, max_length=64))  # is cut afterwards
    assert len(rendered) == len(ROWS)
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert "earlier" in first[0]
    monkeypatch.setattr(tokenising, "LEAST", 10**9)
    for a, b in zip(first, batches(chat(tmp_path)), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_other_rows_templates_and_turns_are_rendered_anew(tmp_path, rendered):
    chat(tmp_path)
    for options in (
        {"turns": "last"},
        {"chat_template": "chatml"},
        {"family": "gemma3"},
        {"rows": [*ROWS[:-1], said("x", "y")]},
    ):
        rendered.clear()
        chat(tmp_path, **options)
        assert rendered, options


def test_what_a_row_lacks_is_still_said_in_one_line(tmp_path):
    rows = [*ROWS, said("a", "b", system="be brief")]
    rows[-1]["messages"].insert(2, {"role": "user", "content": "twice"})
    with pytest.raises(UsageError, match=r"rows\.jsonl.*roles must alternate"):
        chat(tmp_path, rows, "gemma3")


def test_prompts_of_text_streams_are_tokenized_once(monkeypatch):
    codec = PretrainedCodec(load_tokenizer(str(saved("llama"))), "llama")
    examples = [Example("", f"prompt {i}", f"answer {i}") for i in range(4)]
    made = []
    inner = PromptData._encoded
    monkeypatch.setattr(
        PromptData, "_encoded", lambda self, row: (made.append(row), inner(self, row))[1]
    )
    index = torch.arange(4)
    first = PromptData(examples, codec, 32, 16, 0)[index]
    assert len(made) == 4
    again = PromptData(examples, codec, 32, 16, 0)[index]
    assert len(made) == 4
    monkeypatch.setattr(tokenising, "LEAST", 10**9)
    plain = PromptData(examples, codec, 32, 16, 0)[index]
    assert len(made) == 8
    for name in first:
        assert torch.equal(first[name], again[name])
        assert torch.equal(first[name], plain[name])


def test_a_damaged_cache_costs_a_warning_and_nothing_else(tmp_path):
    first = batches(chat(tmp_path))
    for path in (tmp_path / "cache").glob("*.arrow"):
        path.write_bytes(b"nothing")
    with pytest.warns(UserWarning, match="cannot keep tokens"):
        again = batches(chat(tmp_path))
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
