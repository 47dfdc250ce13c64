"""Floating point operations of a step: what strategies add to a plain loop over transformers."""

import functools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from texts import make_learner
from texts import make_stream as make_texts
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode

from cl_bench.contracts import IGNORE
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.svd.adaptive_svd import AdaptiveSVD
from cl_bench.subspace import Restriction, Split

transformers = pytest.importorskip("transformers")


def operations(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def test_fine_tuning_costs_what_a_bare_loop_over_transformers_does():
    stream = make_texts()
    learner = make_learner("llama", stream, functools.partial(AdamW, lr=1e-3))
    learner.begin(stream[0], Finetune())
    learner.train()
    batch = stream[0].train[torch.arange(3)]
    joined = learner.joined(batch)

    def bare():
        logits = learner.model(input_ids=joined["input_ids"], use_cache=False).logits[:, :-1]
        labels = joined["labels"][:, 1:]
        F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE).backward()

    ours = operations(lambda: learner.training_step(batch, 0).backward())
    assert ours == operations(bare) > 0


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
