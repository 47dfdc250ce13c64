"""The streams of the gradient-projection papers, on generated data of the hub's format."""

import numpy as np
import pytest
import torch
from conftest import DATA_AT_HAND
from pictures import assert_same, everything, write_parquet
from PIL import Image

from cl_bench.cli import main
from cl_bench.contracts import augmented
from cl_bench.contracts.errors import UsageError
from cl_bench.tasks.cifar100_superclass import SUPERCLASSES, TASK_ORDERS, CIFAR100Superclass
from cl_bench.tasks.five_datasets import FiveDatasets
from cl_bench.tasks.images.source import measure
from cl_bench.tasks.images.task import ImageData
from cl_bench.tasks.split_cifar100 import SplitCIFAR100
from cl_bench.tasks.split_mini_imagenet import SplitMiniImageNet
from cl_bench.tracking import read_matrix

CIFAR100 = DATA_AT_HAND / "cifar100"
needs_cifar100 = pytest.mark.skipif(not CIFAR100.is_dir(), reason=f"no CIFAR-100 in {CIFAR100}")
CIFAR_MEAN, CIFAR_STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """One cache for all tests here: decoding the real data set takes a while."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CL_BENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def cifar100(tmp_path_factory):
    """CIFAR-100's format as on the hub, 8 and 2 images a class; (folder, pixels, labels)."""
    folder = tmp_path_factory.mktemp("cifar100")
    rng = np.random.RandomState(0)
    labels = {"train": rng.permutation(np.arange(800) % 100), "test": np.arange(200) % 100}
    names = [f"class{i}" for i in range(100)]
    columns = ("img", "fine_label")
    pixels = write_parquet(folder, labels, (32, 32, 3), names, columns)
    return folder, pixels, labels


def normalised(pixels, mean=CIFAR_MEAN, std=CIFAR_STD):
    """(x - mean) / std of uint8 (n, h, w, c), as (n, c, h, w)."""
    x = (pixels.astype(np.float64) - np.array(mean)) / np.array(std)
    return torch.from_numpy(x).permute(0, 3, 1, 2).float()


def labels_of(stream):
    return [task.labels for task in stream]


# --- split CIFAR-100 ------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_tasks", "size"), [(10, 10), (20, 5)])
def test_split_cifar100_takes_classes_in_order(cifar100, num_tasks, size):
    folder, pixels, labels = cifar100
    stream = SplitCIFAR100(num_tasks=num_tasks, data_dir=str(folder))
    assert (stream.scenario, stream.input_shape) == ("task", (3, 32, 32))
    assert stream.heads == [size] * num_tasks
    assert labels_of(stream) == np.arange(100).reshape(num_tasks, size).tolist()
    for t, task in enumerate(stream):
        assert (task.index, task.head, task.classes) == (t, t, range(t * size, (t + 1) * size))
        test = everything(task.test)
        rows = np.flatnonzero(labels["test"] // size == t)
        assert test["y"].tolist() == labels["test"][rows].tolist()
        assert torch.allclose(test["x"], normalised(pixels["test"][rows]), atol=1e-6)
        assert test["task"].tolist() == [t] * len(rows)
        held = int(0.05 * 8 * size)
        assert (len(task.validation), len(task.train)) == (held, 8 * size - held)


def test_split_cifar100_splits_hold_every_training_image_once(cifar100):
    folder, pixels, labels = cifar100
    stream = SplitCIFAR100(data_dir=str(folder))
    parts = [everything(data) for task in stream for data in (task.train, task.validation)]
    x, y = (torch.cat([part[name] for part in parts]) for name in ("x", "y"))
    expected = normalised(pixels["train"])
    order = torch.cat([torch.cat([t._train.rows, t._validation.rows]) for t in stream])
    assert order.sort().values.tolist() == list(range(800))
    assert torch.allclose(x, expected[order], atol=1e-6)
    assert y.tolist() == labels["train"][order].tolist()


def test_split_cifar100_first_tasks_are_a_prefix(cifar100):
    folder, *_ = cifar100
    whole = SplitCIFAR100(data_dir=str(folder))
    first = SplitCIFAR100(num_tasks=3, classes_per_task=10, data_dir=str(folder))
    assert (len(first), first.heads) == (3, [10, 10, 10])
    for a, b in zip(first, whole, strict=False):
        assert_same(everything(a.train), everything(b.train))
        assert_same(everything(a.test), everything(b.test))


def test_split_cifar100_augments_training_alone(cifar100):
    folder, *_ = cifar100
    plain = SplitCIFAR100(data_dir=str(folder))[0]
    task = SplitCIFAR100(data_dir=str(folder), augment="crop_flip")[0]
    assert augmented(plain.train, 0) is None
    for name in ("train", "validation", "test"):
        assert_same(everything(getattr(task, name)), everything(getattr(plain, name)))
    assert_same(task.sample(5, 0), plain.sample(5, 0))
    seen = everything(augmented(task.train, 0))
    assert torch.equal(seen["plain"], everything(plain.train)["x"])
    assert seen["x"].shape == seen["plain"].shape
    changed = (seen["x"] != seen["plain"]).flatten(1).any(1)
    assert changed.float().mean() > 0.9
    assert augmented(task.test, 0) is augmented(task.validation, 0) is None


def test_split_cifar100_order_seed(cifar100):
    folder, *_ = cifar100

    def made(**options):
        torch.manual_seed(len(options))
        return SplitCIFAR100(data_dir=str(folder), **options)

    one, again, two = (made(class_order="random", order_seed=seed) for seed in (1, 1, 2))
    assert labels_of(one) == labels_of(again) != labels_of(two)
    assert sorted(np.concatenate(labels_of(one)).tolist()) == list(range(100))
    assert_same(everything(one[4].train), everything(again[4].train))
    # Without a random order of classes the seed decides what is held out, and nothing else.
    plain, other = made(), made(order_seed=1)
    assert labels_of(plain) == labels_of(other)
    assert not torch.equal(plain[0]._validation.rows, other[0]._validation.rows)
    assert_same(everything(plain[0].test), everything(other[0].test))


def test_class_incremental_split_cifar100_tells_no_task(cifar100):
    folder, *_ = cifar100
    stream = SplitCIFAR100(scenario="class", data_dir=str(folder))
    assert (stream.task_id_at_test, stream.heads) == (False, [10] * 10)
    assert "task" not in everything(stream[3].test)


def test_other_data_is_not_taken_for_cifar100(tmp_path):
    write_parquet(tmp_path / "few", {"train": [0, 1], "test": [0, 1]}, (32, 32, 3))
    with pytest.raises(UsageError, match=r"CIFAR-100 has 100 classes of 32x32 .* has 2 of 32x32"):
        SplitCIFAR100(data_dir=str(tmp_path / "few"))
    with pytest.raises(UsageError, match=r"'image' or 'img', 'label' or 'fine_label'"):
        SplitCIFAR100(data_dir=str(tmp_path / "nowhere"))


@needs_cifar100
def test_split_cifar100_is_the_published_protocol():
    stream = SplitCIFAR100(data_dir=str(CIFAR100))
    for task in stream:
        assert (len(task._train), len(task._validation), len(task._test)) == (4750, 250, 1000)
        assert torch.bincount(task._test.y).tolist()[task.classes.start :] == [100] * 10
    # As published, in units of 255.
    found = measure(stream[0]._train.pixels)
    assert np.allclose(found.mean, (0.5070751592371323, 0.48654887331495095, 0.4409178433670343))
    assert np.allclose(found.std, (0.2673342858792, 0.2564384629171, 0.2761504713257))
    batch = stream[9].sample(8, 0)
    assert batch["x"].shape == (8, 3, 32, 32)
    assert batch["y"].min() >= 90


# --- CIFAR-100 by superclass ----------------------------------------------------------------------


def test_superclasses_part_all_classes():
    labels = [label for _, five in SUPERCLASSES for label in five]
    assert sorted(labels) == list(range(100))
    assert all(len(five) == 5 for _, five in SUPERCLASSES)
    assert all(sorted(order) == list(range(20)) for order in TASK_ORDERS)


@pytest.mark.parametrize("task_order", [0, 3])
def test_superclass_tasks_hold_the_classes_of_one_superclass(cifar100, task_order):
    folder, pixels, labels = cifar100
    stream = CIFAR100Superclass(task_order=task_order, data_dir=str(folder))
    assert (len(stream), stream.heads, stream.scenario) == (20, [5] * 20, "task")
    for t, (task, superclass) in enumerate(zip(stream, TASK_ORDERS[task_order], strict=True)):
        name, members = SUPERCLASSES[superclass]
        assert (task.name, task.index, task.head) == (name, t, t)
        assert (task.labels, task.classes) == (list(members), range(5 * t, 5 * t + 5))
        rows = np.flatnonzero(np.isin(labels["test"], members))
        test = everything(task.test)
        expected = [5 * t + members.index(label) for label in labels["test"][rows]]
        assert test["y"].tolist() == expected
        assert torch.allclose(test["x"], normalised(pixels["test"][rows], 0, 255), atol=1e-6)
        assert (len(task.train), len(task.validation)) == (38, 2)
        assert not set(task._train.rows.tolist()) & set(task._validation.rows.tolist())


def test_superclass_random_order_and_prefix(cifar100):
    folder, *_ = cifar100

    def names(**options):
        return [t.name for t in CIFAR100Superclass(data_dir=str(folder), **options)]

    one, two = names(task_order=None, order_seed=1), names(task_order=None, order_seed=2)
    assert one == names(task_order=None, order_seed=1) != two
    assert sorted(one) == sorted(two) == sorted(names())
    assert names(num_tasks=3) == ["aquatic_mammals", "fish", "flowers"]


def test_superclass_quirk_is_the_authors_reshape(cifar100):
    folder, pixels, labels = cifar100
    task = CIFAR100Superclass(official_quirks=True, data_dir=str(folder))[0]
    rows = np.flatnonzero(np.isin(labels["test"], task.labels))
    # Their steps, on what a CIFAR pickle holds: a row of 1024 red, 1024 green, 1024 blue bytes.
    flat = np.float32(pixels["test"][rows].transpose(0, 3, 1, 2).reshape(len(rows), -1)) / 255
    theirs = flat.reshape(len(rows), 32, 32, 3).swapaxes(2, 3).swapaxes(1, 2)
    assert torch.allclose(everything(task.test)["x"], torch.from_numpy(theirs.copy()), atol=1e-6)


@needs_cifar100
def test_superclasses_are_those_of_the_data_set():
    import pyarrow.parquet as pq

    table = pq.read_table(CIFAR100 / "test.parquet", columns=["label", "coarse_label"])
    coarse = dict(zip(table["label"].to_pylist(), table["coarse_label"].to_pylist(), strict=True))
    for i, (_, members) in enumerate(SUPERCLASSES):
        assert {coarse[label] for label in members} == {i}


# --- five data sets -------------------------------------------------------------------------------

FIVE = ("cifar10", "mnist", "svhn", "fashion_mnist", "notmnist")
HUB_IDS = {
    "uoft-cs/cifar10": "cifar10",
    "ylecun/mnist": "mnist",
    "ufldl-stanford/svhn": "svhn",
    "zalando-datasets/fashion_mnist": "fashion_mnist",
    "anubhavmaity/notMNIST": "notmnist",
}


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    """All five in their formats, 8 and 2 images a class; (folder, {name: pixels}, labels)."""
    folder = tmp_path_factory.mktemp("five")
    labels = {"train": np.arange(80) % 10, "test": np.arange(20) % 10}
    pixels = {}
    for name in FIVE:
        shape = (32, 32, 3) if name in ("cifar10", "svhn") else (28, 28)
        columns = ("img" if name == "cifar10" else "image", "label")
        pixels[name] = write_parquet(folder / name, labels, shape, list("abcdefghij"), columns)
    return folder, pixels, labels


def framed(pixels):
    """Grey 28x28 images as 32x32 in colour, black around."""
    if pixels.ndim == 4:
        return pixels
    return np.repeat(np.pad(pixels, ((0, 0), (2, 2), (2, 2)))[..., None], 3, axis=-1)


FIVE_MOMENTS = {
    "cifar10": (CIFAR_MEAN, CIFAR_STD),
    "mnist": (0.1 * 255, 0.2752 * 255),
    "svhn": (
        np.array([0.4377, 0.4438, 0.4728]) * 255,
        np.array([0.198, 0.201, 0.197]) * 255,
    ),
    "fashion_mnist": (0.2190 * 255, 0.3318 * 255),
    "notmnist": (0.4254 * 255, 0.4501 * 255),
}


def check_five(stream, five, names=FIVE):
    _, pixels, labels = five
    assert [task.name for task in stream] == list(names)
    assert (stream.input_shape, stream.heads) == ((3, 32, 32), [10] * len(names))
    for t, task in enumerate(stream):
        assert (task.head, task.classes) == (t, range(10 * t, 10 * t + 10))
        test = everything(task.test)
        assert test["y"].tolist() == (10 * t + labels["test"]).tolist()
        expected = normalised(framed(pixels[task.name]["test"]), *FIVE_MOMENTS[task.name])
        assert torch.allclose(test["x"], expected, atol=1e-5)
        assert (len(task.train), len(task.validation)) == (76, 4)
        held = {*task._validation.rows.tolist()}
        assert held.isdisjoint(task._train.rows.tolist())


def test_five_datasets_are_framed_and_normalised_each_on_its_own(five):
    folder, *_ = five
    stream = FiveDatasets(data_dir=str(folder))
    check_five(stream, five)
    assert isinstance(stream[0].train, ImageData), "inputs are made when they are fetched"
    licences = {task.name: task.origin.licence for task in stream}
    assert (licences["fashion_mnist"], licences["svhn"]) == ("MIT", "non-commercial use only")
    again = FiveDatasets(data_dir=str(folder))
    assert again.fingerprint == stream.fingerprint
    index = torch.tensor([3, 0])
    for a, b in zip(stream, again, strict=True):
        assert_same(a.train[index], b.train[index])
    few = FiveDatasets(["svhn", "mnist"], scenario="class", data_dir=str(folder))
    check_five(few, five, ("svhn", "mnist"))
    assert few.fingerprint != stream.fingerprint


def test_five_datasets_from_the_hub(five, monkeypatch):
    """With the hub's data sets played by the generated ones: ids, configurations, columns."""
    import datasets

    folder, *_ = five
    asked = []

    def load_dataset(dataset, config=None, revision=None):
        asked.append((dataset, config))
        path = folder / HUB_IDS[dataset]
        return datasets.DatasetDict(
            {s: datasets.Dataset.from_parquet(str(path / f"{s}.parquet")) for s in labels}
        )

    labels = five[2]
    monkeypatch.setattr("cl_bench.tasks.images.files.hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    check_five(FiveDatasets(), five)
    assert asked == [(k, "cropped_digits" if "svhn" in k else None) for k in HUB_IDS]


def test_five_datasets_say_what_is_missing(five, tmp_path):
    folder, *_ = five
    (tmp_path / "five").mkdir()
    for name in FIVE[:3]:
        (tmp_path / "five" / name).symlink_to(folder / name)
    with pytest.raises(UsageError) as caught:
        FiveDatasets(data_dir=str(tmp_path / "five"))
    message = str(caught.value)
    assert message.startswith(f"stream.data_dir={tmp_path}/five: has no subfolder fashion_mnist, ")
    assert f"subfolders {', '.join(FIVE)}, each with train*.parquet" in message
    (tmp_path / "five/notmnist").mkdir()
    with pytest.raises(UsageError, match=r"found an empty folder in notmnist\."):
        FiveDatasets(["cifar10", "notmnist"], data_dir=str(tmp_path / "five"))
    with pytest.raises(UsageError, match=r"stream.datasets=\[mnist, mnist\]: name each task"):
        FiveDatasets(["mnist", "mnist"], data_dir=str(folder))
    write_parquet(tmp_path / "odd/svhn", {"train": [0, 1], "test": [0, 1]}, (32, 30, 3))
    with pytest.raises(UsageError, match=r"svhn has 10 classes .* this data has 2 of 32x30"):
        FiveDatasets(["svhn"], data_dir=str(tmp_path / "odd"))


# --- split miniImageNet ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mini_imagenet(tmp_path_factory):
    """The hub's format, 4 and 2 images a class of another size; (folder, pixels, labels)."""
    folder = tmp_path_factory.mktemp("mini")
    labels = {"train": np.arange(400) % 100, "validation": np.arange(200) % 100}
    pixels = write_parquet(folder, labels, (40, 50, 3), [f"n{i:08}" for i in range(100)])
    for split in labels:
        (folder / f"{split}.parquet").rename(folder / f"{split}-00000-of-00001.parquet")
    return folder, pixels, labels


def test_split_mini_imagenet_resizes_and_orders(mini_imagenet):
    folder, pixels, labels = mini_imagenet
    stream = SplitMiniImageNet(class_order="fixed", data_dir=str(folder))
    assert (stream.input_shape, stream.heads) == ((3, 84, 84), [5] * 20)
    assert labels_of(stream) == np.arange(100).reshape(20, 5).tolist()
    task = stream[7]
    assert isinstance(task.train, ImageData), "inputs are made when they are fetched"
    rows = np.flatnonzero(labels["validation"] // 5 == 7)
    resized = [
        np.asarray(Image.fromarray(p).resize((84, 84), Image.Resampling.BILINEAR))
        for p in pixels["validation"][rows]
    ]
    mean, std = np.array([0.485, 0.456, 0.406]) * 255, np.array([0.229, 0.224, 0.225]) * 255
    test = everything(task.test)
    assert torch.allclose(test["x"], normalised(np.stack(resized), mean, std), atol=1e-5)
    assert test["y"].tolist() == labels["validation"][rows].tolist()
    halves = SplitMiniImageNet(validation_fraction=0.25, data_dir=str(folder))
    for task in halves:
        assert (len(task.train), len(task.validation)) == (15, 5)
        assert not set(task._train.rows.tolist()) & set(task._validation.rows.tolist())
    assert sorted(np.concatenate(labels_of(halves)).tolist()) == list(range(100))
    assert labels_of(halves) == labels_of(SplitMiniImageNet(data_dir=str(folder)))
    assert labels_of(halves) != labels_of(SplitMiniImageNet(order_seed=1, data_dir=str(folder)))


def test_split_mini_imagenet_refuses_other_data(mini_imagenet, tmp_path):
    folder, *_ = mini_imagenet
    with pytest.raises(UsageError, match=r"train\*.parquet and test\*.parquet"):
        SplitMiniImageNet(test_split="test", data_dir=str(folder))
    write_parquet(tmp_path / "few", {"train": [0, 1], "validation": [0, 1]})
    with pytest.raises(UsageError, match="miniImageNet has 100 classes, this data has 2"):
        SplitMiniImageNet(data_dir=str(tmp_path / "few"))


# --- all of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "hub_id"),
    [
        (SplitCIFAR100, "uoft-cs/cifar100"),
        (CIFAR100Superclass, "uoft-cs/cifar100"),
        (FiveDatasets, "uoft-cs/cifar10"),
        (SplitMiniImageNet, "timm/mini-imagenet"),
    ],
)
def test_offline_without_a_folder_is_one_error(make, hub_id, monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr("cl_bench.tasks.images.files.hub_reachable", lambda: False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    with pytest.raises(UsageError) as caught:
        make()
    message = str(caught.value)
    assert message.startswith(f"stream.data_dir=null: {hub_id} cannot be loaded")
    assert "the hub cannot be reached" in message
    assert "Set stream.data_dir to a folder with" in message
    assert "+stream=split_digits" in message
    assert ("subfolders cifar10, mnist, svhn" in message) == (make is FiveDatasets)


@pytest.mark.parametrize("stream", ["five_datasets", "split_mini_imagenet", "cifar100_superclass"])
def test_streams_run_with_the_papers_networks(stream, request, tmp_path, monkeypatch):
    """One short run each through the command line's own path, with the configured network."""
    fixtures = {"five_datasets": "five", "split_mini_imagenet": "mini_imagenet"}
    folder, *_ = request.getfixturevalue(fixtures.get(stream, "cifar100"))
    size = "datasets=[svhn,mnist]" if stream == "five_datasets" else "num_tasks=2"
    extra = {
        "five_datasets": ["model.nf=2"],
        "split_mini_imagenet": ["stream.classes_per_task=5", "stream.validation_fraction=0.2"],
    }
    arguments = [
        "+strategy=finetune",
        f"+stream={stream}",
        f"stream.data_dir={folder}",
        f"stream.{size}",
        *extra.get(stream, []),
        "trainer.max_epochs=1",
        "alignment.enabled=false",
        "logger.mode=disabled",
        f"run_dir={tmp_path / 'run'}",
    ]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["cl_bench", *arguments])
    assert main() == 0
    names, matrix = read_matrix(tmp_path / "run")
    assert len(names) == 2
    assert np.isfinite(matrix[2]).all()
