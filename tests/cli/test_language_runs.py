"""Language models from the command line: start weights on disk, few-shot runs, mistakes."""

import json

import pytest
import torch
from conftest import DATA_AT_HAND
from texts import TEXTS, make_stream, one, whole
from torch.optim import SGD

from cl_bench.contracts import Protect
from cl_bench.learners import Causal, language
from cl_bench.models import t5
from cl_bench.tracking import read_results

transformers = pytest.importorskip("transformers")

DATA = DATA_AT_HAND / "cl_benchmark"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no {DATA}")


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
