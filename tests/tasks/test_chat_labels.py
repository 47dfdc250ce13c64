"""What of a conversation is learned, token by token, in templates of three families' shape."""

import chats
import pytest
import torch
from chats import said, saved, write
from conftest import DATA_AT_HAND

from cl_bench.contracts import IGNORE, UsageError
from cl_bench.tasks.chat import Chat

SYSTEM = said("hi", "yo", "so", "ok", system="be")

WANTED = {
    # What is written, and whether the model learns to say it.
    "llama": [
        [
            ("<|begin_of_text|>", False),
            ("<|start_header_id|>system<|end_header_id|>\n\nbe<|eot_id|>", False),
            ("<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>", False),
            ("<|start_header_id|>assistant<|end_header_id|>\n\n", False),
            ("yo<|eot_id|>", True),
            ("<|start_header_id|>user<|end_header_id|>\n\nso<|eot_id|>", False),
            ("<|start_header_id|>assistant<|end_header_id|>\n\n", False),
            ("ok<|eot_id|>", True),
        ]
    ],
    # Old answers stand without their thought: no one text has both, so each is a sample.
    "qwen3": [
        [
            ("<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n", False),
            ("<|im_start|>assistant\n", False),
            ("<think>\n\n</think>\n\nyo<|im_end|>", True),
        ],
        [
            ("<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n", False),
            ("<|im_start|>assistant\nyo<|im_end|>\n<|im_start|>user\nso<|im_end|>\n", False),
            ("<|im_start|>assistant\n", False),
            ("<think>\n\n</think>\n\nok<|im_end|>", True),
        ],
    ],
    "gemma3": [
        [
            ("<bos><start_of_turn>user\nbe\n\nhi<end_of_turn>\n<start_of_turn>model\n", False),
            ("yo<end_of_turn>", True),
            ("\n<start_of_turn>user\nso<end_of_turn>\n<start_of_turn>model\n", False),
            ("ok<end_of_turn>", True),
        ]
    ],
}


def stream_of(tmp_path, family, rows, **options):
    options = {"validation_fraction": 0.0, "tokenizer": str(saved(family)), **options}
    return Chat([write(tmp_path / "rows.jsonl", rows)], **options)


def labelled(task, row):
    """Tokens of a training sample, and labels behind which each stands (None: not learned)."""
    batch = task.train[torch.tensor([row])]
    n = int(batch["attention_mask"].sum())
    answer = batch["labels"][0][batch["labels"][0] != IGNORE].tolist()
    earlier = batch.get("earlier", torch.full_like(batch["input_ids"], IGNORE))[0, :n].tolist()
    tokens = [*batch["input_ids"][0, :n].tolist(), *answer]
    return tokens, [*earlier, *answer]


@pytest.mark.parametrize("family", WANTED)
def test_every_token_is_learned_or_read_as_the_template_has_it(family, tmp_path):
    stream = stream_of(tmp_path, family, [SYSTEM] * 3)
    words = chats.tokenizer(family)
    assert len(stream[0].train) == 2 * len(WANTED[family])  # one row of three is scored
    for row, wanted in enumerate(WANTED[family]):
        pieces = [
            (words(text, add_special_tokens=False)["input_ids"], says) for text, says in wanted
        ]
        tokens, labels = labelled(stream[0], row)
        assert tokens == [token for ids, _ in pieces for token in ids]
        assert labels == [t if learned else IGNORE for ids, learned in pieces for t in ids]
    assert tokens.count(words.bos_token_id) == (words.bos_token is not None)


@pytest.mark.parametrize("family", WANTED)
def test_what_is_scored_is_the_last_answer_behind_the_prompt_that_asks_for_it(family, tmp_path):
    stream = stream_of(tmp_path, family, [SYSTEM] * 3)
    batch, words = stream[0].test[torch.arange(1)], chats.tokenizer(family)
    prompt = words.apply_chat_template(
        SYSTEM["messages"][:-1], add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    assert batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist() == prompt
    assert "earlier" not in batch
    example = int(batch["example"])
    assert stream.answer(example) == "ok"
    written = "<think>\n\n</think>\n\nok" if family == "qwen3" else "ok"
    assert stream.text(batch["labels"][0]) == written
    scored = stream_of(tmp_path, family, [SYSTEM] * 3, metric="exact_match")
    assert scored.grade(example, written) == scored.grade(example, "OK.") == 1.0
    assert scored.grade(example, written + " no") == 0.0


def test_a_template_that_is_told_not_to_think_asks_behind_the_empty_thought(tmp_path):
    stream = stream_of(
        tmp_path, "qwen3", [said("hi", "yo")] * 3, chat_options={"enable_thinking": False}
    )
    labels = labelled(stream[0], 0)[1]
    learned = [t for t in labels if t != IGNORE]
    assert stream.codec.decode(learned) == "yo"
    assert learned[-1] == stream.end


def test_the_last_turn_alone(tmp_path):
    stream = stream_of(tmp_path, "llama", [SYSTEM] * 3, turns="last")
    assert not stream.teaches_prompts
    assert stream.codec.decode([t for t in labelled(stream[0], 0)[1] if t != IGNORE]) == "ok"


MARKED = chats.GEMMA.replace(
    "{{- m['content'] | trim -}}{{- '<end_of_turn>\n' -}}",
    "{%- if role == 'model' -%}{%- generation -%}{{- m['content'] | trim -}}"
    "{{- '<end_of_turn>' -}}{%- endgeneration -%}{{- '\n' -}}"
    "{%- else -%}{{- m['content'] | trim -}}{{- '<end_of_turn>\n' -}}{%- endif -%}",
)


def test_a_templates_own_marks_are_compared(tmp_path):
    rows = [said("hi", "yo", "so", "ok")] * 3
    good, bad = tmp_path / "good.jinja", tmp_path / "bad.jinja"
    good.write_text(MARKED)
    bad.write_text(MARKED.replace("role == 'model'", "role == 'user'"))  # marks the questions
    marked = stream_of(tmp_path, "gemma3", rows, chat_template=str(good))
    assert labelled(marked[0], 0) == labelled(stream_of(tmp_path, "gemma3", rows)[0], 0)
    with pytest.raises(
        UsageError, match=r"rows.jsonl: row \d: the chat template marks generations"
    ):
        stream_of(tmp_path, "gemma3", rows, chat_template=str(bad))


def test_a_long_prompt_loses_its_beginning_and_no_answer_its_end(tmp_path):
    rows = [said("0123456789" * 4, "yes") for _ in range(4)] + [said("hi", "no")] * 4
    stream = stream_of(tmp_path, "gemma3", rows, max_length=30)
    task, words = stream[0], chats.tokenizer("gemma3")
    whole = "<start_of_turn>user\n" + "0123456789" * 4 + "<end_of_turn>\n<start_of_turn>model\n"
    ids = words(whole, add_special_tokens=False)["input_ids"]
    for row in range(len(task.train)):
        tokens, _ = labelled(task, row)
        text = words.decode(tokens)
        assert tokens[0] == words.bos_token_id
        assert text.endswith(("yes<end_of_turn>", "no<end_of_turn>"))
        if "yes" in text:
            assert len(tokens) == 30
            assert tokens[1:-4] == ids[-25:]
    assert task.facts["truncated"] == 4
    assert task.facts["samples"] == 8
    assert "rows: 4 of 8 samples lost the beginning" in stream.remarks[0]
    with pytest.raises(
        UsageError, match=r"row 1: its answer takes 61 tokens, and stream.max_length"
    ):
        stream_of(tmp_path, "gemma3", [said("hi", "x" * 60)] * 3, max_length=50)


def test_prompts_and_instructions_are_turns_where_there_is_a_template(tmp_path):
    asked = stream_of(tmp_path, "llama", [{"prompt": "hi", "completion": "yo"}] * 3)
    told = stream_of(tmp_path, "llama", [{"instruction": "hi", "input": "", "output": "yo"}] * 3)
    chat = stream_of(tmp_path, "llama", [said("hi", "yo")] * 3)
    assert labelled(asked[0], 0) == labelled(told[0], 0) == labelled(chat[0], 0)
    more = stream_of(tmp_path, "llama", [{"instruction": "a", "input": "b", "output": "c"}] * 3)
    assert "a\n\nb<|eot_id|>" in chats.tokenizer("llama").decode(labelled(more[0], 0)[0])


def test_without_a_template_a_prompt_has_its_first_token_once(tmp_path):
    rows = [{"prompt": "hi ", "completion": "yo"}] * 3
    stream = stream_of(tmp_path, "llama", rows, chat_template="none")
    words = chats.tokenizer("llama")
    tokens, labels = labelled(stream[0], 0)
    assert words.decode(tokens) == "<|begin_of_text|>hi yo<|end_of_text|>"
    assert words.decode([t for t in labels if t != IGNORE]) == "yo<|end_of_text|>"


def test_a_wordpiece_vocabulary_is_cut_where_its_own_tokens_end(tmp_path):
    vocabulary = DATA_AT_HAND / "tokenizers" / "bert-base-uncased" / "vocab.txt"
    if not vocabulary.is_file():
        pytest.skip(f"no {vocabulary}")
    import transformers

    words = transformers.BertTokenizer(str(vocabulary), eos_token="[SEP]")
    words.save_pretrained(tmp_path / "words")
    stream = Chat(
        [write(tmp_path / "rows.jsonl", [said("what is it", "an apple", "and", "trees")] * 3)],
        tokenizer=str(tmp_path / "words"),
        chat_template="chatml",
        validation_fraction=0.0,
    )
    tokens, labels = labelled(stream[0], 0)
    learned = [t for t in labels if t != IGNORE]
    assert [t for t, label in zip(tokens, labels, strict=True) if label != IGNORE] == learned
    wanted = words.tokenize("an apple < | im _ end | > trees < | im _ end | >")
    assert words.convert_ids_to_tokens(learned) == [*wanted, "[SEP]"]
