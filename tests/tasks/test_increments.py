"""Which classes come when: B0 and B50, the order of seed 1993, so many rows of a class."""

import numpy as np
import pytest
import torch

from cl_bench.contracts import UsageError
from cl_bench.tasks.images.increments import SEED_1993, first_of_each, increments, ordered
from cl_bench.tasks.split_digits import SplitDigits
from cl_bench.tasks.split_images import SplitImages


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((100, 10, None), [10] * 10),
        ((100, None, 5), [5] * 20),
        ((100, None, 10, 50), [50] + [10] * 5),
        ((100, 26, None, 50), [50] + [2] * 25),
        ((100, 3, 10, 50), [50, 10, 10]),
        ((7, None, 2, 1), [1, 2, 2, 2]),
    ],
)
def test_sizes_of_tasks(options, expected):
    assert increments(*options) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((100, None, 7, 50), "classes_per_task=7: after the first 50 classes 50 are left"),
        ((100, None, 10, 100), "first_classes=100: the data set has 100 classes"),
        ((100, 1, None, 50), "num_tasks=1: .*one more"),
        ((100, 4, None, 50), "num_tasks=4: after the first 50 classes 50 are left"),
        ((100, None, None, 50), "num_tasks=null: after the first 50"),
    ],
)
def test_classes_that_do_not_divide_are_refused(options, message):
    with pytest.raises(UsageError, match=f"stream.{message}"):
        increments(*options)


@pytest.mark.parametrize("count", [100, 200])
def test_the_order_of_seed_1993_is_numpys(count):
    kept = ordered(count, "class_order", "seed_1993", 0)
    assert kept == np.random.RandomState(1993).permutation(count).tolist()
    assert kept == list(SEED_1993[count])
    with pytest.raises(UsageError, match="class_order=seed_1993: is kept for 100 and 200 classes"):
        ordered(10, "class_order", "seed_1993", 0)


def test_the_first_rows_of_each_class():
    y = torch.tensor([3, -1, 0, 3, 0, 3, -1, 0, 7])
    assert first_of_each(y, None).tolist() == [0, 2, 3, 4, 5, 7, 8]
    assert first_of_each(y, 1).tolist() == [0, 2, 8]
    assert first_of_each(y, 2).tolist() == [0, 2, 3, 4, 8]
    assert first_of_each(torch.tensor([-1]), 2).tolist() == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five classes of seven training and four test images each, whose value is (class, row)."""
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 7), ("test", 4)):
        for label in range(5):
            (root / split / f"c{label}").mkdir(parents=True)
            for row in range(count):
                pixels = np.full((4, 4, 3), 20 * label + row, dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / f"c{label}" / f"{row}.png")
    return root


def test_a_stream_of_increments(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("CL_BENCH_CACHE", str(tmp_path))
    stream = SplitImages(
        data_dir=str(folder),
        scenario="class",
        first_classes=3,
        classes_per_task=1,
        train_per_class=4,
        test_per_class=2,
        validation_fraction=0.25,
        validation_split="first",
        mean=0.0,
        std=1.0,
    )
    assert stream.heads == [3, 1, 1]
    assert [list(t.classes) for t in stream] == [[0, 1, 2], [3], [4]]
    test = stream[0].test[torch.arange(6)]
    assert (test["x"][:, 0, 0, 0] * 255).round().tolist() == [0, 1, 20, 21, 40, 41]
    train, held = stream[1].train, stream[1].validation
    assert (train[torch.arange(3)]["x"][:, 0, 0, 0] * 255).round().tolist() == [61, 62, 63]
    assert (held[torch.arange(1)]["x"][:, 0, 0, 0] * 255).round().tolist() == [60]
    with pytest.raises(UsageError, match=r"scenario=domain: domain has one head for all"):
        SplitImages(data_dir=str(folder), scenario="domain", first_classes=3, num_tasks=2)
    with pytest.raises(UsageError, match=r"first_classes=3: has no effect with stream.how=rotated"):
        SplitImages(data_dir=str(folder), how="rotated", first_classes=3)


def test_plain_streams_are_as_they_were():
    stream = SplitDigits(scenario="class")
    assert stream.heads == [2] * 5
