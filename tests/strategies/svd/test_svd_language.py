"""Adaptive SVD on language models: which matrices, shared weights, padding."""

import pytest
import torch
from cores import half, split_of, touching
from torch import nn
from torch.optim import AdamW
from toys import make_stream

from cl_bench.contracts import UsageError
from cl_bench.experiment.weights import read_weights
from cl_bench.learners import NetworkServices
from cl_bench.strategies.svd.adaptive_svd import AdaptiveSVD
from cl_bench.subspace import CosineSum

pytestmark = pytest.mark.usefixtures("no_pictures")

transformers = pytest.importorskip("transformers")

# -- language models ------------------------------------------------------------------------------


FAMILIES = {
    "t5": (
        "T5",
        [
            *(f"encoder.block.{b}.layer.0.SelfAttention.{m}" for b in (0, 1) for m in "qkvo"),
            *(
                f"encoder.block.{b}.layer.1.DenseReluDense.{m}"
                for b in (0, 1)
                for m in ("wi", "wo")
            ),
            *(f"decoder.block.{b}.layer.0.SelfAttention.{m}" for b in (0, 1) for m in "qkvo"),
            *(
                f"decoder.block.{b}.layer.2.DenseReluDense.{m}"
                for b in (0, 1)
                for m in ("wi", "wo")
            ),
        ],
    ),
    **{
        family: (
            name,
            [
                f"model.layers.{b}.{m}_proj"
                for b in (0, 1)
                for m in (
                    *(f"self_attn.{x}" for x in "qkvo"),
                    *(f"mlp.{x}" for x in ("gate", "up", "down")),
                )
            ],
        )
        for family, name in (("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"))
    },
    "gpt2": (
        "GPT2",
        [
            f"transformer.h.{b}.{m}"
            for b in (0, 1)
            for m in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        ],
    ),
    "gpt_neox": (
        "GPTNeoX",
        [
            f"gpt_neox.layers.{b}.{m}"
            for b in (0, 1)
            for m in (
                "attention.query_key_value",
                "attention.dense",
                "mlp.dense_h_to_4h",
                "mlp.dense_4h_to_h",
            )
        ],
    ),
}


def language_model(family, tied=False):
    torch.manual_seed(0)
    shared = {"vocab_size": 40, "tie_word_embeddings": tied, "bos_token_id": 0, "eos_token_id": 1}
    wide = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    wide |= {"num_attention_heads": 2, "max_position_embeddings": 32}
    sizes = {
        "t5": {
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 2,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
        "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
        "gpt_neox": wide,
    }.get(family, {**wide, "num_key_value_heads": 2})
    name = FAMILIES[family][0]
    config = getattr(transformers, f"{name}Config")(**shared, **sizes)
    head = {"t5": "ForConditionalGeneration", "gpt2": "LMHeadModel"}.get(family, "ForCausalLM")
    return getattr(transformers, name + head)(config)


class Bare(NetworkServices):
    """A transformers model as strategies see it."""

    batch_size, seed = 4, 0

    def __init__(self, model):
        self.model = model
        self.held_norms = set()

    @property
    def network(self):
        return self.model

    def blocks(self):
        body = self.model.base_model
        if hasattr(body, "encoder"):
            return [*body.encoder.block, *body.decoder.block]
        return list(body.h if hasattr(body, "h") else body.layers)

    def is_guarded_head(self, name, heads):
        return heads != "never" if name in ("lm_head", "embed_out") else None

    def __call__(self, batch, head=None):
        return self.model(**batch).loss

    def loss(self, out, batch):
        return out

    def label_logits(self, out, batch):
        raise NotImplementedError

    parameters = property(lambda self: self.model.parameters)


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_of_a_family_are_attention_and_mlp_and_all_get_gradients(family):
    learner = Bare(language_model(family))
    strategy = AdaptiveSVD(**half(start_task=0))
    expected = FAMILIES[family][1]
    assert sorted(m.name for m in strategy.targets(learner)) == sorted(expected)
    strategy.setup(learner, make_stream()[0])
    groups = strategy.param_groups(learner)
    optimizer = AdamW([g for g in groups if g["params"]], lr=1e-2)
    tokens = torch.randint(2, 40, (4, 8))
    before = {k: v.clone() for k, v in learner.model.state_dict().items()}
    for _ in range(2):
        learner({"input_ids": tokens, "labels": tokens}).backward()
        strategy.constrain(learner)
        for name in expected:
            assert strategy.restricted.updates[name].B.grad.norm() > 0, name
        optimizer.step()
        strategy.after_step(learner, {}, torch.empty(0))
        optimizer.zero_grad()
    after = learner.model.state_dict()
    for layer in strategy.layers:
        name = f"{layer.name}.weight"
        D = layer.matrix(after[name] - before[name], None)
        assert D.norm() > 0
        assert max(touching(strategy.restricted.splits[layer.name], D)) < 1e-3
    # Nothing of it is in the network: the state loads in the vanilla class and says the same.
    vanilla = type(learner.model)(learner.model.config)
    vanilla.load_state_dict(after)
    for model in (vanilla, learner.model):
        model.eval()
    given_tokens = {"input_ids": tokens, "labels": tokens}
    with torch.no_grad():
        assert torch.equal(vanilla(**given_tokens).logits, learner.model(**given_tokens).logits)


def test_the_released_scripts_would_be_caught():
    """They copy the rebuilt weight under ``no_grad``: no factor is given a gradient."""
    torch.manual_seed(0)
    linear = nn.Linear(6, 6, bias=False)
    split = split_of(linear.weight.detach(), 3)
    U, s, V = (nn.Parameter(t.float().clone()) for t in (split.U_l, split.values[3:], split.V_l))
    high = (split.U_h * split.values[:3].float()) @ split.V_h.t()
    with torch.no_grad():
        linear.weight.copy_(high + (U * s) @ V.t())
    linear(torch.randn(4, 6)).square().sum().backward()
    assert [p.grad for p in (U, s, V)] == [None, None, None]


def test_shared_weights_and_embeddings_are_no_targets():
    learner = Bare(language_model("gpt2", tied=True))
    names = [m.name for m in AdaptiveSVD().targets(learner)]
    assert "lm_head" not in names
    tied = Bare(language_model("gpt2"))
    h = tied.model.transformer.h
    h[1].mlp.c_fc.weight = h[0].mlp.c_fc.weight
    with pytest.raises(UsageError, match=r"'transformer\.h\.1\.mlp\.c_fc' shares its weight"):
        AdaptiveSVD(include=["*h.1*"]).check(tied)
    with pytest.raises(UsageError, match="leave no layer to constrain; there are"):
        AdaptiveSVD(include=["*.q_proj"]).check(learner)


def test_norms_of_transformers_own_classes_are_norms():
    learner = Bare(language_model("t5"))
    strategy = AdaptiveSVD(**half(start_task=0, train_rest="norms"))
    strategy.setup(learner, make_stream()[0])
    free = {n for n, p in learner.model.named_parameters() if p.requires_grad}
    assert {n for n in free if "layer_norm" not in n} == {
        f"{name}.weight" for name in FAMILIES["t5"][1]
    }
    assert {n for n, _ in learner.model.named_parameters() if "layer_norm" in n} <= free


# -- padding, resuming, processes, the command line ------------------------------------------------


def test_padding_does_not_count_towards_importance():
    from biographies import make_causal, world

    learner = make_causal()
    task = world()[0]
    batch = task.sample(8, 0)
    counted = batch["attention_mask"].sum(1)
    longer = {
        "input_ids": nn.functional.pad(batch["input_ids"], (0, 5), value=3),
        "labels": nn.functional.pad(batch["labels"], (0, 5), value=-100),
        "attention_mask": nn.functional.pad(batch["attention_mask"], (0, 5)),
    }
    layers = AdaptiveSVD().targets(learner)
    found = []
    for given_batch in (batch, longer):
        sums = {m.name: CosineSum(m.matrix(m.weight.detach(), None)) for m in layers}
        learner.tap(layers, [given_batch], sums)
        found.append(sums)
    assert found[0][layers[0].name].rows == int(counted.sum())
    for layer in layers:
        assert found[0][layer.name].mean == pytest.approx(found[1][layer.name].mean, abs=1e-6)


def test_from_the_command_line_a_language_model_keeps_its_class(cli, tmp_path):
    status, _, error = cli(
        "+strategy=adaptive_svd",
        "+stream=biography/smoke",
        "strategy.schedule=fixed",
        "stream.pretrain.steps=5",
        "stream.epochs=[1,1]",
        "stream.people=40",
        "stream.new_people=20",
        "eval.dense=[]",
        "probe.recovery.enabled=false",
        "logger.mode=disabled",
        "run_dir=run",
    )
    assert status == 0, error
    lines = (tmp_path / "run" / "layers.csv").read_text()
    assert "capacity_left" in lines
    assert "unprotected" in lines
    saved = read_weights(tmp_path / "run" / "weights" / "task0002.safetensors")
    assert not [name for name in saved if "B" in name.split(".")]
    from transformers import GPTNeoXConfig, GPTNeoXModel

    body = {k.removeprefix("backbone."): v for k, v in saved.items() if k.startswith("backbone.")}
    vocabulary, width = body["embed_in.weight"].shape
    config = GPTNeoXConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
    )
    missing, unexpected = GPTNeoXModel(config).load_state_dict(body, strict=False)
    assert not missing
    assert not unexpected
