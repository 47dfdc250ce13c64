"""Batches that are cut by tokens: none too large, every sample once, as many in every epoch."""

import functools

import chats
import pytest
import torch
from biographies import make_causal, world
from chats import said, saved, write
from lightning import Trainer
from torch.optim import SGD
from toys import Silent

from cl_bench.contracts import Plan, UsageError
from cl_bench.experiment import LightningEngine, LoopSettings
from cl_bench.experiment.loader import TrainLoader
from cl_bench.experiment.token_batches import TokenBatches, token_counts
from cl_bench.learners import language
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.tasks.chat import Chat

QUIET = functools.partial(
    Trainer, accelerator="cpu", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip


def test_no_batch_holds_more_tokens_and_every_sample_comes_once():
    torch.manual_seed(0)
    for most in (64, 200, 1000):
        counts = torch.randint(1, 33, (150,))
        batches = TokenBatches(counts, most)
        for _ in range(5):
            order = torch.randperm(150)
            bounds = batches.bounds(order)
            assert len(bounds) == batches.steps == len(batches.bounds())
            assert [start for start, _ in bounds] == [0, *(end for _, end in bounds[:-1])]
            assert bounds[-1][1] == 150
            sizes = [int(counts[order[start:end]].sum()) for start, end in bounds]
            assert max(sizes) <= most
            assert min(sizes) > 0
            assert max(sizes) - min(sizes) <= 2 * int(counts.max())


def test_tokens_are_counted_with_their_answers():
    learner = make_causal()
    counts = token_counts(learner, world()[0].train, 1000, "first")
    batch = world()[0].train[torch.arange(len(counts))]
    assert torch.equal(counts, batch["attention_mask"].sum(1))
    with pytest.raises(UsageError, match=r"batch_tokens=20: task 'first' has a sample of \d+ tok"):
        token_counts(learner, world()[0].train, 20, "first")


def test_a_task_is_learned_in_batches_of_tokens_whose_share_is_recorded(tmp_path):
    torch.manual_seed(0)
    sizes = torch.randint(1, 120, (60,)).tolist()
    rows = [said("x" * size, "y" * (size // 3 + 1)) for size in sizes]
    stream = Chat([write(tmp_path / "rows.jsonl", rows)], str(saved("llama")), test_fraction=0.05,
                  validation_fraction=0.0)  # fmt: skip
    shares = {}

    def learned(packing):
        model = chats.model("llama", len(stream.vocabulary))
        rule = functools.partial(SGD, lr=0.01)
        learner = language(stream, model, rule, batch_size=4, seed=0, packing=packing)
        seen, record = [], Silent()
        record.epoch = lambda **told: shares.update({packing: told})
        inner = learner.training_step
        learner.training_step = lambda batch, batch_idx: (seen.append(batch), inner(batch, 0))[1]
        settings = LoopSettings(0, 4, batch_tokens=1024)
        engine = LightningEngine(learner, Finetune(), QUIET, settings, None, record, Silent())
        engine.learn(stream[0], Plan(stream[0].train, 1))
        tokens = [int(learner.tokens(batch).sum()) for batch in seen]
        assert max(tokens) <= 1024
        assert sum(tokens) == int(token_counts(learner, stream[0].train, 1024, "").sum())
        assert shares[packing]["steps"] == len(seen) > 3

    learned(True)
    learned(False)
    assert shares[True]["useful_tokens"] >= 0.95
    assert shares[False]["useful_tokens"] < 0.8


def test_samples_of_a_pack_are_counted_by_number_alone():
    with pytest.raises(UsageError, match=r"pack=2, batch_tokens=64: .* use pack=1"):
        LoopSettings(pack=2, batch_tokens=64)


def test_a_resumed_epoch_goes_on_behind_its_position():
    counts = torch.arange(1, 41)
    data = world()[0].train
    whole = TrainLoader(data, 4, 0, 0, tokens=(counts.repeat(9)[: len(data)], 200))
    rest = TrainLoader(data, 4, 0, 0, tokens=(counts.repeat(9)[: len(data)], 200))
    batches = list(whole)
    rest.resume_at(0, 2)
    left = list(rest)
    assert len(left) == len(batches) - 2
    assert torch.equal(left[0]["input_ids"], batches[2]["input_ids"])
