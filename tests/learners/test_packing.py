"""Packed samples are learned as apart, and logits are made where labels are and nowhere else."""

import functools

import chats
import pytest
import torch
import transformers
from biographies import make_causal, world
from chats import said, saved, write
from lightning import Trainer
from texts import make_learner, make_stream
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode
from toys import Silent

from cl_bench.contracts import IGNORE, UsageError
from cl_bench.experiment import LightningEngine, LoopSettings
from cl_bench.learners import Causal, language
from cl_bench.learners.packing import FILLED, arranged, pack, require_boundaries
from cl_bench.strategies.distillation.entropy_adaptive import EntropyAdaptive
from cl_bench.strategies.lowrank.o_lora import OLoRA
from cl_bench.strategies.penalty.ewc import EWC
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.strategies.replay.er import ER
from cl_bench.strategies.svd.adaptive_svd import AdaptiveSVD
from cl_bench.tasks.chat import Chat

QUIET = functools.partial(
    Trainer, accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip
FAMILIES = ("llama", "qwen3", "gemma3")
EXACT = {"gemma3": 1e-8}
"""Gemma's norms compute in float32, whatever the weights are."""
ROWS = [
    said("hi", "yo", "so", "ok"),
    said("a much longer question than that one", "no"),
    said("short", "an answer that goes on for quite a while, and then ends"),
    said("?", "!"),
]


def chat(tmp_path, family):
    rows = [row for row in ROWS for _ in range(3)]
    return Chat([write(tmp_path / "rows.jsonl", rows)], str(saved(family)), test_fraction=0.2,
                validation_fraction=0.0)  # fmt: skip


def learner_of(stream, model, **options):
    rule = functools.partial(SGD, lr=0.1)
    return language(stream, model, rule, batch_size=4, seed=0, **options)


def gradients(learner, batch, sparse=True):
    """Loss and gradients of one training step's loss."""
    learner.zero_grad()
    out = learner.outputs(batch) if sparse else learner(batch)
    loss = learner.loss(out, batch)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in learner.named_parameters()
                           if p.grad is not None}  # fmt: skip


def same(found, wanted, tolerance):
    assert torch.allclose(found[0], wanted[0], rtol=tolerance, atol=0)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_batch_is_learned_as_an_unpacked_one(tmp_path, family):
    stream = chat(tmp_path, family)
    model = chats.model(family, len(stream.vocabulary)).double()
    batch = stream[0].train[torch.arange(9)]
    wanted = gradients(learner_of(stream, model), batch, sparse=False)
    packed = learner_of(stream, model, packing=True)
    same(gradients(packed, batch), wanted, EXACT.get(family, 1e-12))
    assert packed.epoch_facts()["useful_tokens"] >= 0.95
    assert packed.epoch_facts() == {}


@pytest.mark.parametrize("architecture", ["gpt_neox", "gpt2"])
def test_texts_are_packed_too_from_any_position(architecture):
    learner = make_causal(architecture).double()
    learner.random_offset = 7
    batch = world()[0].sample(6, 0)
    batch["attention_mask"][2, 9:], batch["labels"][2, 9:] = 0, IGNORE
    torch.manual_seed(5)
    wanted = gradients(learner, batch, sparse=False)
    learner.packing = True
    torch.manual_seed(5)
    same(gradients(learner, batch), wanted, 1e-12)


def test_a_sample_owes_nothing_to_those_it_shares_a_sequence_with(tmp_path):
    stream = chat(tmp_path, "llama")
    learner = learner_of(stream, chats.model("llama", len(stream.vocabulary)), packing=True)
    batch = stream[0].train[torch.arange(6)]
    other = {k: v.clone() for k, v in batch.items()}
    other["input_ids"][0] = (other["input_ids"][0] + 1) % 50
    labelled = int((batch["labels"][0] != IGNORE).sum() + (batch["earlier"][0] != IGNORE).sum())
    before, after = learner.outputs(batch), learner.outputs(other)
    assert torch.equal(before[labelled:], after[labelled:])
    assert not torch.equal(before[:labelled], after[:labelled])


def test_rows_are_as_many_as_leave_them_filled():
    torch.manual_seed(0)
    for high in (3, 40, 300):
        lengths = torch.randint(1, high, (60,)).tolist()
        starts, width = arranged(lengths)
        taken = torch.zeros(1 + max(row for row, _ in starts), width)
        for (row, start), length in zip(starts, lengths, strict=True):
            taken[row, start : start + length] += 1
        assert taken.max() == 1
        assert taken.mean() >= FILLED
        assert width <= 3 * max(lengths)
    assert arranged([5, 7], single=True)[1] == 12


def test_what_is_packed_can_be_found_again():
    tokens = torch.arange(1, 13).view(3, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]])
    packed = pack(tokens, mask, pad=0)
    held = mask.bool()
    assert torch.equal(packed.tokens.flatten()[packed.places[held]], tokens[held])
    assert packed.positions.flatten()[packed.places[held]].tolist() == [0, 1, 2, 3, 0, 0, 1, 2]


def tiny(kind, config, **options):
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 16, **options}
    return getattr(transformers, kind)(getattr(transformers, config)(**shape))


@pytest.mark.parametrize(
    ("kind", "config", "options"),
    [
        ("BloomForCausalLM", "BloomConfig", {"n_layer": 1, "n_head": 2}),
        ("MambaForCausalLM", "MambaConfig", {"num_hidden_layers": 1, "state_size": 4}),
    ],
)
def test_an_architecture_that_mixes_packed_samples_is_refused_by_name(kind, config, options):
    model = tiny(kind, config, **options).train()
    with pytest.raises(UsageError, match=rf"learner\.packing=true: {kind} "):
        require_boundaries(model)
    assert model.training


def test_an_encoder_decoder_is_not_packed():
    learner = make_learner("t5")
    with pytest.raises(UsageError, match=r"packing=true: T5\w+ is an encoder-decoder"):
        language(make_stream(), learner.model, SGD, 4, 0, packing=True)


# -- strategies ---------------------------------------------------------------------------------


def learned(tmp_path, make, packing):
    """Weights after two tasks of unequal samples, in float64."""
    rows = [said("x" * (3 + 11 * i), "y" * (1 + 5 * i)) for i in range(7)]
    files = [write(tmp_path / f"{name}.jsonl", rows) for name in ("one", "two")]
    stream = Chat(files, str(saved("llama")), validation_fraction=0.0)
    model = chats.model("llama", len(stream.vocabulary)).double()
    learner = learner_of(stream, model, packing=packing)
    strategy = make()
    engine = LightningEngine(
        learner, strategy, QUIET, LoopSettings(0, 4), None, Silent(), Silent()
    )  # fmt: skip
    for t, task in enumerate(stream):
        engine.learn(task, strategy.plan(stream, t))
    return learner.weights()


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(ER, memory=6, replay=3),
        functools.partial(GPM, threshold=0.9),
        functools.partial(AdaptiveSVD, start_task=0),
        pytest.param(
            functools.partial(OLoRA, rank=2, dropout=0.0, targets=["q_proj"]),
            marks=pytest.mark.slow,
        ),
        pytest.param(functools.partial(EWC, samples=4), marks=pytest.mark.slow),
        pytest.param(EntropyAdaptive, marks=pytest.mark.slow),
    ],
    ids=lambda make: getattr(make, "func", make).__name__,
)
def test_whole_tasks_come_to_the_same_weights_packed(tmp_path, make):
    apart, packed = (learned(tmp_path, make, packing) for packing in (False, True))
    assert apart.keys() == packed.keys()
    for name, weight in apart.items():
        torch.testing.assert_close(packed[name], weight, rtol=1e-7, atol=1e-9)


# -- logits -----------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most rows of logits that any operation makes."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() and out.shape[-1] == self.vocabulary:
            self.rows = max(self.rows, out.numel() // self.vocabulary)
        return out


@pytest.mark.parametrize("family", [*FAMILIES, "t5"])
def test_logits_are_made_where_labels_are(tmp_path, family):
    if family == "t5":
        stream = make_stream()
        learner = make_learner("t5", stream).double()
    else:
        stream = chat(tmp_path, family)
        learner = learner_of(stream, chats.model(family, len(stream.vocabulary)).double())
    learner.eval()
    batch = stream[0].train[torch.arange(4)]
    wanted = gradients(learner, batch, sparse=False)
    same(gradients(learner, batch), wanted, EXACT.get(family, 1e-12))
    labels = learner.loss_terms(batch)
    with Largest(learner.config.vocab_size) as made:
        out = learner.outputs(batch)
    assert out.shape == (labels, learner.config.vocab_size)
    assert made.rows == labels
    with Largest(learner.config.vocab_size) as made:
        learner(batch)
    assert made.rows > labels


def test_a_head_that_is_not_called_gives_the_same_logits(tmp_path, monkeypatch):
    stream = chat(tmp_path, "llama")
    learner = learner_of(stream, chats.model("llama", len(stream.vocabulary)))
    batch = stream[0].train[torch.arange(4)]
    wanted = learner.outputs(batch)
    model, weight = learner.model, learner.heads[0].weight

    def bypassing(input_ids, use_cache, **more):
        hidden = model.model(input_ids=input_ids, use_cache=False, **more).last_hidden_state
        return type("Out", (), {"logits": hidden @ weight.t()})

    monkeypatch.setattr(Causal, "model", property(lambda self: bypassing))
    torch.testing.assert_close(learner.outputs(batch), wanted)


def test_a_batch_without_labels_costs_nothing(tmp_path):
    stream = chat(tmp_path, "llama")
    learner = learner_of(stream, chats.model("llama", len(stream.vocabulary)), packing=True)
    batch = stream[0].train[torch.arange(2)]
    batch["labels"][:], batch["earlier"][:] = IGNORE, IGNORE
    loss, found = gradients(learner, batch)
    assert loss == 0
    assert all(not gradient.any() for gradient in found.values())


@pytest.mark.parametrize("of", ["loss", "logits"])
def test_gradients_of_many_samples_are_taken_in_parts(tmp_path, of):
    stream = chat(tmp_path, "llama")
    learner = learner_of(stream, chats.model("llama", len(stream.vocabulary)).double())
    batch = stream[0].train[torch.arange(10)]
    learner.batch_size = 10
    whole = learner.gradients(batch, of)
    sizes, inner = [], learner.forward
    learner.forward = lambda part: (sizes.append(len(part["labels"])), inner(part))[1]
    learner.batch_size = 4
    parts = learner.gradients(batch, of)
    assert sizes == [4, 4, 2]
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6)
