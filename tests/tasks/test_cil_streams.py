"""Streams of class-incremental papers from folders in their formats; what backbones knew before."""

import gzip
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cl_bench.contracts import UsageError
from cl_bench.features import FeatureStream, ImageBackbone
from cl_bench.features.overlap import overlap
from cl_bench.tasks.cil_images import KNOWN, CILImages
from cl_bench.tasks.five_datasets import FiveDatasets
from cl_bench.tasks.images.imagenet import among_imagenet, imagenet_names
from cl_bench.tasks.split_cifar100 import SplitCIFAR100
from cl_bench.tasks.split_digits import SplitDigits
from cl_bench.tasks.split_fashion_mnist import SplitFashionMNIST


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("CL_BENCH_CACHE", str(tmp_path_factory.getbasetemp() / "cil_cache"))


CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch
crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo
keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse
mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy
porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper
snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television
tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
""".split()  # noqa: SIM905


def write_idx(path, array):
    head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    content = head + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def fashion(folder, ending=".gz"):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    made = {}
    for side, count in (("train", 40), ("t10k", 20)):
        images, labels = rng.integers(0, 256, (count, 28, 28)), np.arange(count) % 10
        write_idx(folder / f"{side}-images-idx3-ubyte{ending}", images)
        write_idx(folder / f"{side}-labels-idx1-ubyte{ending}", labels)
        made[side] = (images, labels)
    return made


@pytest.mark.parametrize("ending", [".gz", ""])
def test_fashion_mnist_from_idx_files(tmp_path, ending):
    made = fashion(tmp_path / "idx", ending)
    stream = SplitFashionMNIST(data_dir=str(tmp_path / "idx"), validation_fraction=0.0)
    assert stream.heads == [2] * 5
    assert stream[1].facts["class_names"] == ["Pullover", "Dress"]
    assert stream[0].origin.licence == "MIT"
    images, labels = made["train"]
    rows = np.flatnonzero(labels // 2 == 1)
    stored = stream[1].stored("train")
    got = (stored.samples[stored.rows] * 255).round().squeeze(1).numpy()
    np.testing.assert_array_equal(got, images[rows])
    assert stream[1].train[torch.arange(8)]["y"].tolist() == labels[rows].tolist()


def test_idx_files_serve_every_image_stream(tmp_path):
    fashion(tmp_path / "fashion_mnist")
    stream = FiveDatasets(["fashion_mnist"], data_dir=str(tmp_path), validation_fraction=0.0)
    assert stream[0].train[torch.arange(2)]["x"].shape == (2, 3, 32, 32)


def test_a_damaged_idx_file_is_refused(tmp_path):
    fashion(tmp_path / "idx", "")
    path = tmp_path / "idx/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UsageError, match="no whole IDX file of bytes"):
        SplitFashionMNIST(data_dir=str(tmp_path / "idx"))
    write_idx(path, np.zeros((3, 28, 28)))
    with pytest.raises(UsageError, match="no images with a label each"):
        SplitFashionMNIST(data_dir=str(tmp_path / "idx"))


@pytest.fixture(scope="module")
def two_hundred(tmp_path_factory):
    """200 classes named as in ImageNet's folders, two training images and a test image each."""
    root = tmp_path_factory.mktemp("two_hundred")
    for label in range(200):
        for split, count in (("train", 2), ("test", 1)):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for i in range(count):
                image = np.full((5 + i, 6, 3), label, dtype=np.uint8)
                Image.fromarray(image).save(folder / f"{i}.png")
    return root


@pytest.mark.parametrize("benchmark", list(KNOWN))
def test_benchmarks_of_200_classes_by_folder(two_hundred, benchmark):
    stream = CILImages(benchmark, data_dir=str(two_hundred), image_size=8)
    assert (stream.name, stream.scenario, stream.heads) == (benchmark, "class", [20] * 10)
    assert stream.input_shape == (3, 8, 8)
    order = [label for task in stream for label in task.labels]
    assert order == np.random.RandomState(1993).permutation(200).tolist()
    stored = stream[0].stored("test")
    pixels = (stored.samples[stored.rows][:, 0, 0, 0] * 255).round()
    assert sorted(pixels.tolist()) == sorted(order[:20])
    base = CILImages(benchmark, data_dir=str(two_hundred), image_size=8, first_classes=100)
    assert base.heads == [100, 20, 20, 20, 20, 20]
    told = overlap("imagenet-1k", stream)
    # Folder names are WordNet's ids: by name nothing can be said, by the authors' word it can.
    assert told == "unknown" if benchmark == "cub200" else told["classes"] == told["of"] == 200
    assert stream[0].origin == base[3].origin


def test_a_benchmark_that_is_another_is_refused(two_hundred, tmp_path):
    with pytest.raises(UsageError, match=r"stream.data_dir=null: neither stream.data_dir nor"):
        CILImages("cub200")
    for split in ("train", "test"):
        (tmp_path / split / "only").mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / split / "only/0.png")
    with pytest.raises(UsageError, match=r"cub200 has 200 classes, this data 1"):
        CILImages("cub200", data_dir=str(tmp_path))


def test_classes_that_imagenet_has_by_name():
    assert len(imagenet_names()) == 1000
    names = ["orange", "Lawn_Mower", "bear", "willow_tree", "pickup_truck", "sea", "T-shirt/top"]
    assert among_imagenet(names) == [True, True, True, False, True, False, False]
    assert among_imagenet(["0", "1"]) is None, "numbers are no names"
    assert among_imagenet(["n01443537", "bear"]) is None
    assert among_imagenet([]) is None


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """CIFAR-100's form: 100 classes by name, one image each side."""
    root = tmp_path_factory.mktemp("cifar")
    for split in ("train", "test"):
        for i, name in enumerate(CIFAR100):
            (root / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32), (i, 0, 0)).save(root / split / name / "0.png")
    return root


def test_cifar100_without_imagenets_classes(cifar):
    options = {"data_dir": str(cifar), "scenario": "class", "validation_fraction": 0.0}
    whole = SplitCIFAR100(**options)
    told = overlap("imagenet-1k", whole)
    assert (told["classes"], told["of"]) == (63, 100)
    part = SplitCIFAR100(classes="without_imagenet", num_tasks=6, classes_per_task=6, **options)
    assert part.heads == [6] * 6
    names = [n for t in part for n in t.facts["class_names"]]
    assert "willow_tree" in names
    assert not {"lion", "bear", "television"} & set(names)
    assert overlap("imagenet-1k", part)["classes"] == 0
    assert overlap(None, whole) == overlap("laion", whole) == "unknown"
    seeded = SplitCIFAR100(
        class_order="seed_1993", first_classes=50, num_tasks=None, classes_per_task=10, **options
    )
    assert seeded.heads == [50] + [10] * 5
    assert seeded[0].labels[:5] == [68, 56, 78, 8, 23]


def test_the_overlap_is_on_record(cifar):
    class Net(nn.Module):
        trained_on = "imagenet-1k"

        def forward(self, x):
            return x.mean((2, 3))

    stream = SplitCIFAR100(data_dir=str(cifar), scenario="class", validation_fraction=0.0)
    seen = FeatureStream(stream, ImageBackbone(Net(), side=4), lambda line: None)
    assert seen.facts["backbone"]["overlap"]["classes"] == 63
    digits = FeatureStream(SplitDigits(), ImageBackbone(Net(), side=4), lambda line: None)
    assert digits.facts["backbone"]["overlap"] == "unknown"
