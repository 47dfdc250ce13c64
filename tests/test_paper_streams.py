"""The streams of the gradient-projection papers, on generated data of the hub's format."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import assert_same, everything, write_parquet

from cl_bench.contracts.errors import UsageError
from tasks.split_cifar100 import SplitCIFAR100

CIFAR100 = Path(__file__).parents[2] / "shared/data/cifar100"
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
    """(x / 255 - mean) / std of uint8 (n, h, w, c), as (n, c, h, w)."""
    x = pixels.astype(np.float64) / 255
    x = (x - np.array(mean) / 255) / (np.array(std) / 255)
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
    # The training mean and deviation of CIFAR-100 as published, through CIFAR-10's constants.
    pixels = stream[0]._train.pixels
    mean = pixels.double().mean((0, 2, 3)) / 255
    assert torch.allclose(mean, torch.tensor([0.5071, 0.4865, 0.4409]).double(), atol=1e-4)
    batch = stream[9].sample(8, 0)
    raw = pixels[stream[9]._train.rows]
    assert batch["x"].shape == (8, 3, 32, 32)
    assert batch["y"].min() >= 90
    low = (raw.min() / 255 - 125.3 / 255) / (63.0 / 255)
    assert batch["x"][:, 0].min() >= low - 1e-5
