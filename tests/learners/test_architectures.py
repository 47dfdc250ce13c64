"""Language models of many architectures: what is said to be guarded is, and the rest is named."""

import functools

import pytest
import torch
from texts import make_stream
from torch.optim import AdamW
from toys import learn

from cl_bench.contracts import IGNORE, Protect, UsageError
from cl_bench.learners import language
from cl_bench.learners.guards import guards
from cl_bench.models import pretrained
from cl_bench.strategies.lowrank.seq_lora import SeqLoRA
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.strategies.projection.trgp import TRGP
from cl_bench.strategies.svd.adaptive_svd import AdaptiveSVD
from cl_bench.subspace import Restriction

transformers = pytest.importorskip("transformers")

WIDTH, DEPTH = 32, 2
NAMES = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
DECODER = dict(
    hidden_size=WIDTH,
    num_hidden_layers=DEPTH,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=24,
    max_position_embeddings=96,
    **NAMES,
)
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
SHORT = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64}
STATES = dict(hidden_size=WIDTH, num_hidden_layers=DEPTH, state_size=4, **NAMES)
EYES = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

CONFIGS = {
    "gpt2": lambda v: transformers.GPT2Config(
        vocab_size=v, n_embd=WIDTH, n_layer=DEPTH, n_head=2, n_positions=96, **NAMES
    ),
    "llama": lambda v: transformers.LlamaConfig(vocab_size=v, **DECODER),
    "gemma3": lambda v: transformers.Gemma3TextConfig(vocab_size=v, **DECODER, **SHORT),
    "qwen3_moe": lambda v: transformers.Qwen3MoeConfig(
        vocab_size=v, **DECODER, head_dim=8, num_experts=4, **EXPERTS
    ),
    "gpt_oss": lambda v: transformers.GptOssConfig(
        vocab_size=v, **DECODER, head_dim=8, num_local_experts=3, num_experts_per_tok=2
    ),
    "deepseek_v3": lambda v: transformers.DeepseekV3Config(
        vocab_size=v,
        **{**DECODER, "num_key_value_heads": 2},
        **EXPERTS,
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        first_k_dense_replace=1,
    ),
    "mamba": lambda v: transformers.MambaConfig(vocab_size=v, **STATES),
    "mamba2": lambda v: transformers.Mamba2Config(
        vocab_size=v, **STATES, num_heads=8, head_dim=8, n_groups=1, chunk_size=16
    ),
    "t5": lambda v: transformers.T5Config(
        vocab_size=v,
        d_model=WIDTH,
        d_ff=24,
        d_kv=8,
        num_heads=2,
        num_layers=DEPTH,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        dropout_rate=0.0,
    ),
    "gemma3 with eyes": lambda v: transformers.Gemma3Config(
        text_config=dict(vocab_size=v, **DECODER, **SHORT), vision_config=EYES
    ),
}
MIXTURES = ("qwen3_moe", "gpt_oss", "deepseek_v3")
LEFT = {"mamba": {"A_log", "D"}, "mamba2": {"A_log", "D", "dt_bias"}, "gpt_oss": {"sinks"}}
BYPASSED = {"mamba": {"conv1d", "dt_proj"}, "mamba2": {"conv1d"}}


def make(name, stream):
    config = CONFIGS[name](len(stream.vocabulary))
    kind = transformers.AutoModelForCausalLM
    if config.is_encoder_decoder:
        kind = transformers.AutoModelForSeq2SeqLM
    torch.manual_seed(1)
    config._experts_implementation = "eager"  # others know no double precision
    model = kind.from_config(config).float()
    with torch.no_grad():  # mixtures begin with routers that know no difference
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return language(stream, model, functools.partial(AdamW, lr=1e-2), batch_size=5, seed=0)


def outputs(learner, task):
    """Logits of labelled tokens."""
    learner.eval()
    batch = task.train[torch.arange(6)]
    with torch.no_grad():
        logits, labels = learner.targets(learner(batch), batch)
    return logits[labels != IGNORE]


def weights(learner):
    return {n: p.detach().clone() for n, p in learner.named_parameters()}


@pytest.fixture(scope="module")
def stream():
    words = {"letters": [("a", "b"), ("b", "a")], "names": [("cd", "ef"), ("g", "xyz")]}
    return make_stream(length=8, answer=6, texts=words)


@pytest.mark.parametrize("name", CONFIGS)
def test_at_full_energy_old_outputs_stay_and_the_rest_of_the_network_learns(name, stream):
    learner = make(name, stream).double()
    learner.remember_initial_state()
    gpm = GPM(1.0, protect=Protect(tied="frozen_after_first", rest="frozen_after_first"))
    learn(learner, gpm, stream[0], epochs=1, batch_size=5)
    before, old = weights(learner), outputs(learner, stream[0])
    new = outputs(learner, stream[1])
    learn(learner, gpm, stream[1], epochs=2, batch_size=2)
    change = float((outputs(learner, stream[0]) - old).norm() / old.norm())
    assert change < 1e-6, change
    assert float((outputs(learner, stream[1]) - new).norm() / new.norm()) > 1e-4
    moved = {n for n, p in learner.named_parameters() if not torch.equal(p, before[n])}
    guarded = {m.name.partition("#")[0] for m in learner.layers(gpm.protect)}
    own = {n.removesuffix("_bias") for n in moved}
    assert {n if n in guarded else n.rpartition(".")[0] for n in own} <= guarded


@pytest.mark.parametrize("name", [*MIXTURES, *BYPASSED, "llama"])
def test_what_no_subspace_guards_is_named(name, stream):
    learner = make(name, stream)
    found = guards(GPM(), learner)
    named = {tuple(n.split(".")[-2:]) for n in found.names}
    assert {layer for layer, part in named if part in ("weight", "bias")} == BYPASSED.get(
        name, set()
    )
    assert {part for _, part in named} - {"weight", "bias"} == LEFT.get(name, set())
    frozen = guards(GPM(protect=Protect(rest="frozen_after_first")), learner)
    assert not frozen.names
    assert frozen.share == 1.0


def test_a_tap_has_a_bounded_number_of_logits_in_memory(stream, monkeypatch):
    learner = make("llama", stream)
    layers, batch = learner.layers(Protect(bias="free")), stream[0].train[torch.arange(6)]
    whole, calls = learner.tap(layers, [batch]), []
    learner.model.register_forward_pre_hook(
        lambda module, args, given: calls.append(len(given["input_ids"])), with_kwargs=True
    )
    length = batch["input_ids"].shape[1] + batch["labels"].shape[1]
    monkeypatch.setattr("cl_bench.learners.parted.LOGITS", 2 * length * len(stream.vocabulary))
    apart = learner.tap(layers, [batch])
    assert calls == [2, 2, 2]
    for name, moments in whole.items():
        torch.testing.assert_close(apart[name].gram, moments.gram, atol=1e-4, rtol=1e-4)
        assert (apart[name].rows, apart[name].samples) == (moments.rows, 6)


@pytest.mark.parametrize("name", MIXTURES)
def test_an_expert_is_a_matrix_that_sees_the_tokens_sent_to_it(name, stream):
    learner = make(name, stream)
    layers = [m for m in learner.layers(Protect(bias="free")) if m.stacked]
    batch = stream[0].train[torch.arange(3)]
    tokens = int(learner.counted(learner.cut(batch), "").sum())
    moments = learner.tap(layers, [batch])
    by_weight = {}
    for m in layers:
        by_weight.setdefault(m.name.partition("#")[0], []).append(moments[m.name].rows)
    for rows in by_weight.values():
        assert sum(rows) == 2 * tokens  # padding does not count
    first, second = list(by_weight.values())[:2]
    assert first == second
    into, out = layers[0], next(m for m in layers if "down" in m.name)
    experts = into.module
    seen = []
    with torch.no_grad():
        handle = experts.register_forward_pre_hook(lambda _, args: seen.append(args))
        learner.eval()(batch)
        handle.remove()
        hidden, index, _ = seen[0]
        mask = learner.counted(learner.cut(batch), "").flatten()
        own = hidden[(index == 0).any(1) & mask]
        torch.testing.assert_close(
            moments[into.name].gram.float(), own.T @ own, atol=1e-4, rtol=1e-4
        )
        # One token, sent to this expert alone, comes out as W_out (what is said to enter it).
        alone = own[:1]
        made = experts(alone, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
        with_bias = 0 if out.bias is None else out.bias[0]
        entering = learner_units(experts, alone)
        torch.testing.assert_close(made, entering @ out.whole().T + with_bias)


def learner_units(experts, tokens):
    from cl_bench.subspace.experts import hidden_units

    return hidden_units(experts, tokens, 0)


@pytest.mark.parametrize("parametrisation", ["projected_param", "dense_projected", "factored"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_adaptive_svd_keeps_what_leads_in_every_expert(name, parametrisation, stream):
    learner = make(name, stream)
    strategy = AdaptiveSVD(start_task=0, train_rest="none", parametrisation=parametrisation)
    start = {m.name: m.whole().clone() for m in strategy.targets(learner)}
    kept = {}
    release = strategy.release
    strategy.release = lambda of: (kept.update(strategy.restricted.splits), release(of))
    before = weights(learner)
    learn(learner, strategy, stream[0], epochs=1, batch_size=5)
    layers = strategy.targets(learner)
    assert {m.name.partition("#")[0].rpartition(".")[2] for m in layers} >= {
        "gate_up_proj",
        "down_proj",
        "q_proj",
    }
    for m in layers:
        D = m.whole() - start[m.name]
        assert float((D - Restriction(kept[m.name], "two_sided")(D)).abs().max()) < 1e-5, m.name
    moved = {m.parameter for m in layers if not torch.equal(m.whole(), start[m.name])}
    assert moved >= {"gate_up_proj", "down_proj", "weight"}
    own = {m.weight for m in layers}
    for n, p in learner.named_parameters():
        assert p in own or torch.equal(p, before[n]), n


def test_low_rank_pairs_leave_experts_alone_and_scalings_refuse_them(stream):
    learner = make("qwen3_moe", stream)
    before = weights(learner)
    learn(learner, SeqLoRA(rank=2, targets="all"), stream[0], epochs=1, batch_size=5)
    moved = {n for n, p in learner.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all(n.rpartition(".")[0].endswith("_proj") and "expert" not in n for n in moved)
    with pytest.raises(UsageError, match="mixture of experts"):
        TRGP().check(learner)


@pytest.mark.parametrize("name", ["t5", "gemma3 with eyes"])
def test_a_loaded_model_is_of_its_kind_and_knows_that_it_was_trained_before(name, stream, tmp_path):
    learner = make(name, stream)
    assert not learner.pretrained
    learner.model.save_pretrained(tmp_path)
    model = pretrained(str(tmp_path), attention="eager")
    assert type(model) is type(learner.model)
    assert model.config.get_text_config()._attn_implementation == "eager"
    again = language(stream, model, functools.partial(AdamW, lr=1e-2), batch_size=5, seed=0)
    assert again.pretrained
    torch.testing.assert_close(outputs(again, stream[0]), outputs(learner, stream[0]))


def test_what_looks_at_images_stays_as_it_is(stream):
    learner = make("gemma3 with eyes", stream)
    still = [n for n, p in learner.named_parameters() if not learner.learns(p)]
    assert still
    assert all("vision" in n or "projector" in n for n in still)
    assert len(learner.blocks()) == DEPTH
    assert all(
        "language_model" in n or n.startswith("heads")
        for n, p in learner.named_parameters()
        if learner.learns(p)
    )


@pytest.mark.parametrize(("pretrained", "first", "rest"), [(True, 0, "norms"), (False, 1, "all")])
def test_a_pretrained_network_is_constrained_from_its_first_task_on(
    pretrained, first, rest, stream
):
    learner = make("llama", stream)
    learner.model.pretrained = pretrained
    strategy = AdaptiveSVD()
    assert strategy.first_constrained(learner) == first
    assert strategy.learning_rest(learner) == rest
    (line,) = strategy.remarks(learner)
    assert f"from task {first + 1} on" in line
    assert rest in line
    strategy.setup(learner, stream[0])
    assert strategy.constrained == pretrained
    assert learner.embeddings()[0].weight.requires_grad != pretrained


@pytest.mark.parametrize("pretrained", [True, False])
def test_a_pretrained_tied_embedding_is_frozen_after_the_first_task(pretrained, stream):
    learner = make("gemma3", stream)
    learner.model.pretrained = pretrained
    learner.guard(Protect(), first_task=False)
    assert learner.tied
    assert learner.embeddings()[0].weight.requires_grad != pretrained
