"""Transformer blocks: which they are, and what is put into them."""

import functools
import math

import pytest
import torch
from torch import nn
from torch.optim import SGD
from toys import make_learner, make_stream, mlp

from cl_bench.blocks import (
    Bottleneck,
    Bottlenecks,
    Prompted,
    Prompts,
    blocks_of,
    pool_of,
    require_attention,
)
from cl_bench.contracts import Origin, UsageError
from cl_bench.learners import Classifier
from cl_bench.models import ViT
from cl_bench.models.encoder import Encoder
from cl_bench.models.minilm import MiniLM, renamed

WIDTH, HEADS = 8, 2
SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": 4 * WIDTH,
}


class Tokens(nn.Module):
    """Reads token ids, padded with zeros, that a stream gives as other numbers."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.blocks = network.blocks

    def forward(self, x):
        return self.network(tokens(x))


def tokens(x):
    ids = x.abs().mul(10).long() % 19 + 1
    return ids.masked_fill(torch.arange(ids.shape[1]) >= 8 + ids[:, :1] % 5, 0)


def bert(attention="sdpa"):
    from transformers import BertConfig, BertModel

    torch.manual_seed(1)
    config = BertConfig(**SIZES, vocab_size=20, attn_implementation=attention)
    return Encoder(BertModel(config, False), "mean", Origin("made up", "none", "none"), "")


def minilm():
    """With the weights of the other one."""
    network = MiniLM(depth=2, width=WIDTH, heads=HEADS, tokens=20)
    network.load_state_dict(renamed(bert().model.state_dict()))
    return network


def hf_vit():
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(1)
    model = ViTModel(ViTConfig(**SIZES, image_size=2, patch_size=1), False)
    return Encoder(model, "cls", Origin("made up", "none", "none"), "")


def own_vit(pooling="mean"):
    torch.manual_seed(1)
    return ViT((3, 2, 2), 1, 2, WIDTH, HEADS, pooling)


NETWORKS = {
    "vit": lambda: nn.Sequential(nn.Unflatten(1, (3, 2, 2)), own_vit()),
    "transformers vit": lambda: nn.Sequential(nn.Unflatten(1, (3, 2, 2)), hf_vit()),
    "minilm": lambda: Tokens(minilm()),
    "transformers bert": lambda: Tokens(bert()),
}
every = pytest.mark.parametrize("kind", NETWORKS)


def setting(kind):
    learner = Classifier(
        make_stream("class"), NETWORKS[kind](), functools.partial(SGD, lr=0.1), 8, 0
    ).eval()
    learner.seen_heads = 3
    batch = make_stream("class")[0].train[torch.arange(6)]
    return learner, blocks_of(learner, "me"), batch


@every
def test_blocks_are_found_and_add_what_stands_beside_their_mlps(kind):
    """The reader is given the hidden states that the writer's result is added to."""
    learner, blocks, batch = setting(kind)
    assert len(blocks) == 2
    assert {block.width for block in blocks} == {WIDTH}
    require_attention(learner, blocks, "me")
    made = [Bottleneck(WIDTH, 3, 0.5, 0.0) for _ in blocks]
    shown = [made]
    read, plain = [], learner.features(batch)
    keep = blocks[0].reads.register_forward_pre_hook(lambda m, x: read.append(x[0]))
    beside = Bottlenecks(blocks, lambda: shown[0])
    assert torch.equal(learner.features(batch), plain), "it begins at zero"
    torch.nn.init.normal_(made[0].up.weight)
    moved = learner.features(batch)
    assert not torch.allclose(moved, plain)
    shown[0] = None
    assert torch.equal(learner.features(batch), plain)
    beside.remove()
    keep.remove()
    written = blocks[0].writes.register_forward_hook(
        lambda m, x, out: out + 0.5 * made[0].up(made[0].down(read[-1]).relu())
    )
    torch.testing.assert_close(learner.features(batch), moved)
    written.remove()


@every
def test_prefixes_are_read_by_every_position_and_by_each_sample_its_own(kind):
    learner, blocks, batch = setting(kind)
    plain = learner(batch)
    torch.manual_seed(0)
    prefixes = {1: tuple(torch.randn(2, 6, 3, WIDTH))}
    prompted = Prompted(learner, blocks, lambda batch: Prompts(prefixes))
    found = learner(batch)
    assert not torch.allclose(found, plain, atol=1e-3)
    prompted.remove()
    assert torch.equal(learner(batch), plain)
    for i in (0, 1, 5):
        one = {1: tuple(part[i : i + 1].expand(6, -1, -1) for part in prefixes[1])}
        alone = Prompted(learner, blocks, lambda batch, one=one: Prompts(one))
        torch.testing.assert_close(learner(batch)[i], found[i])
        alone.remove()


def test_prefixes_of_our_minilm_do_what_those_of_transformers_bert_do():
    torch.manual_seed(0)
    prompts = Prompts(
        {0: tuple(torch.randn(2, 6, 2, WIDTH)), 1: tuple(torch.randn(2, 6, 3, WIDTH))}
    )
    outs = []
    for kind in ("minilm", "transformers bert"):
        learner, blocks, batch = setting(kind)
        Prompted(learner, blocks, lambda batch: prompts)
        outs.append(learner(batch))
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)


def test_a_prefix_is_further_keys_and_values():
    """Against softmax(q [p, k]^T / sqrt(d)) [p, v], by hand, in the second block."""
    learner, blocks, batch = setting("vit")
    block = blocks[1].module
    torch.manual_seed(0)
    pk, pv = torch.randn(2, 6, 3, WIDTH)
    seen = []
    keep = block.register_forward_hook(lambda m, x, out: seen.append((x[0], out)))
    prompted = Prompted(learner, blocks, lambda batch: Prompts({1: (pk, pv)}))
    learner(batch)
    prompted.remove()
    keep.remove()
    x, found = seen[-1]
    normed = block.norm1(x)
    q, k, v = block.query(normed), block.key(normed), block.value(normed)
    heads = []
    for h in range(HEADS):
        part = slice(h * WIDTH // HEADS, (h + 1) * WIDTH // HEADS)
        keys, values = (torch.cat(pair, 1)[..., part] for pair in ((pk, k), (pv, v)))
        weights = (q[..., part] @ keys.mT / math.sqrt(WIDTH // HEADS)).softmax(-1)
        heads.append(weights @ values)
    x = x + block.out(torch.cat(heads, -1))
    wanted = x + block.down(torch.nn.functional.gelu(block.up(block.norm2(x))))
    torch.testing.assert_close(found, wanted)


@every
def test_positions_are_read_before_the_inputs_and_answer_by_their_mean(kind):
    """What was one layer's result for the prompts is the mean over their places."""
    learner, blocks, batch = setting(kind)
    plain = learner(batch)
    torch.manual_seed(0)
    positions = torch.randn(6, 3, WIDTH)
    pool = pool_of(learner, "me")
    given = []
    prompted = Prompted(learner, blocks, lambda batch: Prompts(positions=positions), pool)
    seen = blocks[-1].module.register_forward_hook(lambda m, x, out: given.append(out))
    found = learner(batch)
    given.append(None)
    learner.features(batch)  # without prompts
    hidden, _, bare = given
    assert hidden.shape[1] == 3 + bare.shape[1]
    if kind == "vit":
        last = learner.backbone[1].norm(hidden)
        torch.testing.assert_close(found, learner.readout(last[:, :3].mean(1)))
    prompted.give = lambda batch: Prompts(positions=positions.flip(0))
    flipped = learner({k: v.flip(0) for k, v in batch.items()})
    torch.testing.assert_close(flipped.flip(0), found)
    seen.remove()
    prompted.remove()
    assert torch.equal(learner(batch), plain)


def test_a_pass_that_fails_leaves_nothing_behind():
    learner, blocks, batch = setting("vit")
    plain = learner(batch)
    prompted = Prompted(learner, blocks, lambda batch: Prompts({0: tuple(torch.ones(2, 6, 1, 8))}))
    with pytest.raises(RuntimeError):
        learner({"x": torch.ones(6, 5)})
    prompted.remove()
    assert torch.equal(learner(batch), plain)


def test_networks_without_such_blocks_are_refused_by_name():
    with pytest.raises(UsageError, match=r"me works inside .* made of Linear"):
        blocks_of(make_learner(make_stream(), mlp()), "me")
    learner = make_learner(make_stream(), Tokens(bert(attention="eager")))
    with pytest.raises(UsageError, match=r"0 of the network's 2 blocks \(BertLayer\)"):
        require_attention(learner, blocks_of(learner, "me"), "me")
    with pytest.raises(UsageError, match="does not tell which module pools"):
        pool_of(make_learner(make_stream(), mlp()), "me")
