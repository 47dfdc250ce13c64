"""Streams of data sets, tensors and folders, made in Python."""

import numpy as np
import pytest
import torch
from chats import write
from PIL import Image

from cl_bench import Stream
from cl_bench.contracts import UsageError
from cl_bench.tasks.split_images import SplitImages


def picture(value):
    return Image.fromarray(np.full((4, 5, 3), value, dtype=np.uint8))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two classes of ten images; the grey value is the number of the image."""
    monkeypatch.setenv("CL_BENCH_CACHE", str(tmp_path / "cache"))
    for c, name in enumerate(("cat", "dog")):
        (tmp_path / "animals" / name).mkdir(parents=True)
        for i in range(10):
            picture(10 * i + c).save(tmp_path / "animals" / name / f"{i}.png")
    return tmp_path / "animals"


def values(task, side):
    """The grey values on a side, undone what normalises them."""
    data = getattr(task, side)
    return data[torch.arange(len(data))]["x"][:, 0, 0, 0]


def test_a_folder_of_classes_without_splits_is_divided_by_seed(folder):
    plain = {"mean": 0.0, "std": 1.0, "num_tasks": 1}
    stream = Stream.from_folder(folder, **plain, validation_fraction=0.0)
    assert isinstance(stream, SplitImages)
    (task,) = stream
    assert task.facts["class_names"] == ["cat", "dog"]
    train, test = (
        {round(255 * float(v)) for v in values(task, side)} for side in ("train", "test")
    )
    assert (len(train), len(test)) == (16, 4)
    assert train | test == {10 * i + c for i in range(10) for c in (0, 1)}
    labels = task.test[torch.arange(4)]["y"].tolist()
    assert sorted(labels) == [0, 0, 1, 1]
    same = Stream.from_folder(folder, **plain, validation_fraction=0.0)
    other = Stream.from_folder(folder, **plain, validation_fraction=0.0, split_seed=1)
    assert torch.equal(values(same[0], "test"), values(task, "test"))
    drawn = [values(one, "test").sort().values for one in (other[0], task)]
    assert not torch.equal(*drawn)
    assert other.fingerprint != stream.fingerprint == same.fingerprint


def test_data_sets_of_images_are_tasks(folder):
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    rows = {"image": [picture(v) for v in range(10)], "label": [v % 2 for v in range(10)]}
    made = datasets.Dataset.from_dict(rows, features=features)
    stream = Stream.from_datasets({"first": made, "second": {"train": made, "test": made}},
                                  image="image", scenario="task")  # fmt: skip
    first, second = stream
    assert (first.name, second.name) == ("first", "second")
    assert (first.classes, second.classes) == (range(2), range(2, 4))
    assert first.facts["class_names"] == ["cat", "dog"]
    assert (len(first.train), len(first.test), len(second.test)) == (8, 2, 10)
    batch = second.test[torch.arange(10)]
    assert batch["x"].shape == (10, 3, 4, 5)
    assert torch.allclose(batch["x"][:, 0, 0, 0], torch.arange(10) / 255)
    with pytest.raises(UsageError, match="row 1 has no 'photo'"):
        Stream.from_datasets([made], image="photo")


def test_data_sets_and_folders_of_text_are_tasks(tmp_path):
    import datasets

    rows = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(8)]
    texts = Stream.from_datasets(
        {"list": rows, "set": {"train": datasets.Dataset.from_list(rows), "test": rows[:2]}},
        tokenizer="bytes",
    )
    assert [task.name for task in texts] == ["list", "set"]
    assert [e.answer for e in texts[1].splits["test"]] == ["a0", "a1"]
    (tmp_path / "b").mkdir()
    write(tmp_path / "a.jsonl", rows)
    write(tmp_path / "b" / "train.jsonl", rows)
    assert [t.name for t in Stream.from_folder(tmp_path, tokenizer="bytes")] == ["a", "b"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no images, nor"):
        Stream.from_folder(tmp_path / "empty")


def test_tensors_are_tasks():
    x, y = torch.rand(6, 3), torch.arange(6) % 2
    stream = Stream.from_tensors([(x, y), (x, y)], names=["a", "b"])
    assert [task.name for task in stream] == ["a", "b"]
