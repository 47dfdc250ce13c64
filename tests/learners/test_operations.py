"""Floating point operations of a step: what strategies add to a plain loop over transformers."""

import functools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from chats import said, saved, write
from texts import make_learner
from texts import make_stream as make_texts
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode

from cl_bench.contracts import IGNORE
from cl_bench.learners import language
from cl_bench.learners.packing import pack
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.svd.adaptive_svd import AdaptiveSVD
from cl_bench.subspace import Restriction, Split
from cl_bench.tasks.chat import Chat

transformers = pytest.importorskip("transformers")


def operations(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def bare(learner, tokens, labels, positions=None):
    """A loop over transformers whose head sees what predicts a label, as ``num_logits_to_keep``."""
    more = {} if positions is None else {"position_ids": positions}
    hidden = learner.model.model(input_ids=tokens, use_cache=False, **more).last_hidden_state
    predicts = F.pad(labels[:, 1:] != IGNORE, (0, 1))
    logits = learner.model.lm_head(hidden[predicts])
    F.cross_entropy(logits, labels[:, 1:][labels[:, 1:] != IGNORE]).backward()


def test_fine_tuning_costs_what_a_bare_loop_over_transformers_does():
    stream = make_texts()
    learner = make_learner("llama", stream, functools.partial(AdamW, lr=1e-3))
    learner.begin(stream[0], Finetune())
    learner.train()
    batch = stream[0].train[torch.arange(3)]
    joined = learner.joined(batch)
    ours = operations(lambda: learner.training_step(batch, 0).backward())
    assert ours == operations(lambda: bare(learner, joined["input_ids"], joined["labels"])) > 0


def packed_learner(tmp_path):
    """SmolLM2's shape at a sixth of its width, and a batch of 4,096 tokens of unequal samples."""
    rows = [said("x" * (40 + 7 * i), "y" * (10 + 3 * i)) for i in range(24)]
    path = write(tmp_path / "rows.jsonl", rows)
    test = write(tmp_path / "test.jsonl", rows[:1])
    stream = Chat([{"path": path, "test": test}], str(saved("llama")), validation_fraction=0.0)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(stream.vocabulary), hidden_size=96, intermediate_size=256,
        num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    rule = functools.partial(AdamW, lr=1e-3)
    learner = language(stream, model, rule, batch_size=24, seed=0, packing=True)
    batch = stream[0].train[torch.arange(24)]
    counts = learner.tokens(batch).cumsum(0)
    return learner, stream[0], {k: v[: int((counts <= 4096).sum())] for k, v in batch.items()}


def one_step(learner, task, batch, strategy):
    """Operations of a whole optimizer step: passes, constraint, rule, and writing weights."""
    learner.begin(task, strategy)
    learner.train()
    optimizer = learner.configure_optimizers()

    def work():
        learner.training_step(batch, 0).backward()
        learner.on_before_optimizer_step(optimizer)
        optimizer.step()

    found = operations(work)
    strategy.release(learner)
    learner.zero_grad()
    return found


def test_a_packed_step_costs_what_a_bare_packed_loop_does_and_adaptive_svd_a_tenth_more(tmp_path):
    learner, task, batch = packed_learner(tmp_path)
    tokens = int(learner.tokens(batch).sum())
    assert 3900 < tokens <= 4096
    joined = learner.joined(batch)
    packed = pack(joined["input_ids"], joined["attention_mask"], learner.pad)
    assert tokens >= 0.95 * packed.tokens.numel()
    held = joined["attention_mask"].bool()
    labels = torch.full_like(packed.tokens, IGNORE).flatten()
    labels[packed.places[held]] = joined["labels"][held]
    labels = labels.view_as(packed.tokens)
    free = one_step(learner, task, batch, Finetune())
    assert free == operations(lambda: bare(learner, packed.tokens, labels, packed.positions)) > 0
    assert free < one_step(learner, task, batch, AdaptiveSVD(start_task=0)) <= 1.10 * free
    learner.packing = False
    assert one_step(learner, task, batch, Finetune()) > 1.2 * free


def split(layer, ratio):
    """Half of a matrix kept; shapes alone."""
    n, m = layer.weight.shape
    r = min(n, m)
    k = int(ratio * r)
    U_l = None if n > m else torch.empty(n, r - k, device="meta")
    V_l = None if m > n else torch.empty(m, r - k, device="meta")
    sides = [torch.empty(size, k, device="meta") for size in (n, m)]
    return Split(torch.empty(r, device="meta"), *sides, U_l, V_l)


def test_a_step_of_adaptive_svd_on_4096_tokens_costs_at_most_a_tenth_more():
    """SmolLM2-135M's sizes: 30 blocks of width 576."""
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
        given = {
            "input_ids": torch.zeros(1, 4096, dtype=torch.int64),
            "attention_mask": torch.zeros(1, 1, 4096, 4096),
        }
    free = operations(lambda: model(**given, use_cache=False).logits.sum().backward())
    linear = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    ratio = AdaptiveSVD().preserve_ratio

    def constrained():
        for layer in linear:
            restriction = Restriction(split(layer, ratio), "two_sided")
            restriction.expand(restriction.reduce(layer.weight), layer.weight.detach())

    share = operations(constrained) / free
    assert 0 < share < 0.10, share
