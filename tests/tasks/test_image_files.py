"""Streams from folders of images and from parquet."""

import hashlib
import itertools
import pickle

import numpy as np
import pytest
import torch
from pictures import assert_same, everything, make_pixels, write_folder, write_parquet
from PIL import Image

from cl_bench.contracts.errors import UsageError
from cl_bench.data import MemoryData
from cl_bench.tasks.split_images import SplitImages

pytestmark = pytest.mark.usefixtures("cache")


def test_imagefolder_stream_holds_the_images_of_the_folder(tmp_path):
    pixels = write_folder(tmp_path / "data")
    stream = SplitImages(
        data_dir=str(tmp_path / "data"), num_tasks=2, mean=0.0, std=1.0, validation_fraction=0.0
    )
    assert stream.name == "split_images"
    assert stream.input_shape == (3, 6, 5)
    assert [task.classes for task in stream] == [range(2), range(2, 4)]
    for split in ("train", "test"):
        batches = [everything(getattr(task, split)) for task in stream]
        x = torch.cat([batch["x"] for batch in batches])
        expected = torch.from_numpy(pixels[split]).permute(0, 3, 1, 2).float() / 255
        assert torch.equal(x, expected)
        per_class = len(expected) // 4
        y = torch.cat([batch["y"] for batch in batches])
        assert y.tolist() == [label for label in range(4) for _ in range(per_class)]


def test_parquet_columns_moments_and_fingerprint(tmp_path):
    labels = {"train": [0, 1, 2, 0, 1, 2] * 4, "test": [2, 1, 0]}
    pixels = write_parquet(tmp_path / "data", labels, columns=("img", "fine"))
    arguments = {"image_column": "img", "label_column": "fine", "classes_per_task": 1}
    stream = SplitImages(
        data_dir=str(tmp_path / "data"), scenario="class", validation_fraction=0.0, **arguments
    )
    x = torch.cat([everything(task.train)["x"] for task in stream])
    assert torch.allclose(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(x.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5)
    train = pixels["train"].astype(np.float64) / 255
    moments = stream[0]._train.view.moments
    assert np.allclose(moments.mean, train.mean((0, 1, 2)), atol=1e-12)
    assert np.allclose(moments.std, train.std((0, 1, 2)), atol=1e-12)

    arrays = {
        "test": pixels["test"].transpose(0, 3, 1, 2),
        "train": pixels["train"].transpose(0, 3, 1, 2),
        "test_labels": np.array(labels["test"]),
        "train_labels": np.array(labels["train"]),
        "num_classes": np.array(3),
    }
    result = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        result.update(f"{name} torch.{array.dtype} {array.shape}\n".encode() + array.tobytes())
    assert stream.fingerprint == result.hexdigest()


@pytest.mark.parametrize("layout", ["folder", "parquet"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"how": "split", "num_tasks": 2, "class_order": "random"},
        {"how": "permuted", "num_tasks": 3, "identity_first": True},
        {"how": "rotated", "num_tasks": 3, "image_size": [7, 4], "grayscale": True},
    ],
    ids=["split", "permuted", "rotated"],
)
def test_decoding_on_fetch_gives_the_same_batches(tmp_path, layout, arguments):
    if layout == "folder":
        write_folder(tmp_path / "data")
    else:
        write_parquet(tmp_path / "data", {"train": [0, 1, 2, 3] * 6, "test": [3, 2, 1, 0]})
    held = SplitImages(data_dir=str(tmp_path / "data"), **arguments)
    fetched = SplitImages(data_dir=str(tmp_path / "data"), in_memory=False, **arguments)
    assert held.input_shape == fetched.input_shape
    for a, b in zip(held, fetched, strict=True):
        for split in ("train", "validation", "test"):
            assert isinstance(getattr(a, split), MemoryData)
            assert not isinstance(getattr(b, split), MemoryData)
            assert_same(everything(getattr(a, split)), everything(getattr(b, split)))
        few = torch.tensor([4, 0, 2])
        assert_same(a.train[few], b.train[few])
        assert_same(a.sample(5, seed=1), b.sample(5, seed=1))


def test_folder_and_parquet_agree_and_copies_share_a_fingerprint(tmp_path):
    write_folder(tmp_path / "one")
    write_folder(tmp_path / "two")
    one, two = (
        SplitImages(data_dir=str(tmp_path / name), num_tasks=2, in_memory=in_memory).fingerprint
        for name, in_memory in (("one", True), ("two", True))
    )
    assert one == two
    lazy = [
        SplitImages(data_dir=str(tmp_path / name), num_tasks=2, in_memory=False).fingerprint
        for name in ("one", "two")
    ]
    assert lazy[0] == lazy[1] != one


def test_resized_grey_images_are_pillows(tmp_path):
    pixels = write_folder(tmp_path / "data")
    stream = SplitImages(
        data_dir=str(tmp_path / "data"),
        how="permuted",
        num_tasks=1,
        identity_first=True,
        image_size=4,
        grayscale=True,
        mean=0.0,
        std=1.0,
    )
    assert stream.input_shape == (1, 4, 4)
    for x, raw in zip(everything(stream[0].test)["x"], pixels["test"], strict=True):
        image = Image.fromarray(raw).convert("L").resize((4, 4), Image.Resampling.BILINEAR)
        assert torch.equal(x[0], torch.from_numpy(np.asarray(image).copy()).float() / 255)


def test_data_that_does_not_fit_is_refused_with_the_remedy(tmp_path):
    def refused(message, **arguments):
        with pytest.raises(UsageError, match=message):
            SplitImages(**{"data_dir": str(tmp_path / "data"), "num_tasks": 2, **arguments})

    write_folder(tmp_path / "data")
    refused("stream.mean=.*3 channels", mean=[0.1, 0.2], std=[1.0, 1.0])
    refused("stream.num_tasks=3: the data set has 4 classes", num_tasks=3)
    odd = tmp_path / "data/train/kind1/odd.png"
    Image.fromarray(make_pixels(1, (9, 9, 3))[0]).save(odd)
    refused("stream.image_size=null: images differ in size.*9x9.*set stream.image_size")
    odd.write_bytes(b"no image at all")
    refused("odd.png.*cannot be decoded")
    Image.fromarray(np.zeros((6, 5), dtype=np.uint16)).save(odd)
    refused("odd.png.*8 bits a channel")
    odd.unlink()
    Image.fromarray(make_pixels(1, (6, 5))[0]).save(tmp_path / "data/train/kind0/0000.png")
    refused("stream.grayscale=null: the first image is grey.*set stream.grayscale")
    extra = tmp_path / "data/test/kind9/0.png"
    extra.parent.mkdir()
    Image.fromarray(make_pixels(1, (6, 5, 3))[0]).save(extra)
    refused(r"classes that train/ lacks: \['kind9'\]")


@pytest.mark.parametrize(
    ("labels", "names", "arguments", "message"),
    [
        (([0, 0, 2, 2], [0, 1, 2]), None, {}, r"task 'class_1': classes \[1\] have no training"),
        (([0, 1, 2, 2], [0, 1]), None, {}, r"task 'class_2': classes \[2\] have no test"),
        (([0, 1], [0, 1, 2]), None, {}, "test split has labels from 0 to 2, but its 2 classes"),
        (([0, 1, -1], [0, 1]), None, {}, "training split has labels from -1 to 1"),
        (
            ([0, 1, 0, 1], [0, 1]),
            None,
            {"how": "permuted", "validation_fraction": 0.75, "validation_split": "first"},
            "'perm_0': .*validation_split=random",
        ),
        (([0, 1], [0, 1]), None, {"label_column": "y"}, "stream.label_column=y: .*'label'"),
        (([0, 1], [0, 1]), None, {"image_column": "x"}, "stream.image_column=x: .*'image'"),
        (([0, 1], [0, 1]), None, {"image_column": "label"}, "stream.image_column=label: holds no"),
        (([0, 1], [0, 1]), None, {"label_column": "image"}, "stream.label_column=image"),
        (([0, 1], [0, 1]), ["a", "b", "c"], {}, r"classes \[2\] have no training samples"),
        (([], [0, 1]), ["a", "b"], {}, '"train" corresponds to no data'),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, labels, names, arguments, message):
    train, test = labels
    write_parquet(tmp_path / "data", {"train": train, "test": test}, names=names)
    if "how" not in arguments:
        arguments = {"classes_per_task": 1, "scenario": "class", **arguments}
    with pytest.raises(UsageError, match=message):
        SplitImages(data_dir=str(tmp_path / "data"), **arguments)


def _flat(root, split, kind, names, columns):
    """A parquet file of images that are one value each, and their labels."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": kind})
    pixels = [Image.fromarray(np.full((4, 4), v, np.uint8)) for v in columns]
    root.mkdir(parents=True, exist_ok=True)
    rows = {"image": pixels, "label": names}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(root / f"{split}.parquet")


def _values(data):
    batch = everything(data)
    return {
        int(y): sorted({round(float(v) * 255) for v in batch["x"][batch["y"] == y].flatten()})
        for y in batch["y"].unique()
    }


WHOLE = {"num_tasks": 1, "scenario": "class", "validation_fraction": 0, "mean": 0.0, "std": 1.0}


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_class_is_its_name_in_both_splits(tmp_path, in_memory):
    import datasets

    for split, names in (("train", ["dark", "light"]), ("test", ["rest", "light", "dark"])):
        labels = [names.index(n) for n in ("dark", "light")]
        _flat(tmp_path, split, datasets.ClassLabel(names=names), labels, [10, 240])
    (task,) = SplitImages(data_dir=str(tmp_path), in_memory=in_memory, **WHOLE)
    assert _values(task.train) == _values(task.test) == {0: [10], 1: [240]}
    assert task.facts["class_names"] == ["dark", "light"]
    again = SplitImages(data_dir=str(tmp_path), in_memory=in_memory, **WHOLE)  # from the cache
    assert again[0].facts == task.facts
    _flat(tmp_path, "test", datasets.ClassLabel(names=["dark", "rest"]), [0, 1], [10, 99])
    with pytest.raises(UsageError, match="does not name: rest"):
        SplitImages(data_dir=str(tmp_path), in_memory=in_memory, **WHOLE)


def test_files_of_a_split_that_name_classes_differently_are_refused(tmp_path):
    import datasets

    for split, names in (("train1", ["a", "b"]), ("train2", ["b", "a"]), ("test", ["a", "b"])):
        _flat(tmp_path, split, datasets.ClassLabel(names=names), [0, 1], [1, 2])
    with pytest.raises(UsageError, match="the train files there name their classes differently"):
        SplitImages(data_dir=str(tmp_path), **WHOLE)


@pytest.mark.parametrize(
    ("train", "test", "kind", "names"),
    [
        ([0, 2, 5], [5, 0, 2], "int64", ["0", "2", "5"]),
        ([1, 2, 3], [3, 2, 1], "uint8", ["1", "2", "3"]),
        ([0, 1, 2**62], [0, 1, 2**62], "int64", ["0", "1", str(2**62)]),  # no class each below it
        (["no10", "no9", "no1"], ["no9", "no1", "no10"], "string", ["no1", "no9", "no10"]),
    ],
)
def test_labels_with_gaps_are_numbered_on_request(tmp_path, train, test, kind, names):
    import datasets

    value = {label: 10 * i for i, label in enumerate(train)}
    _flat(tmp_path, "train", datasets.Value(kind), train, [value[v] for v in train])
    _flat(tmp_path, "test", datasets.Value(kind), test, [value[v] for v in test])
    with pytest.raises(UsageError):
        SplitImages(data_dir=str(tmp_path), **WHOLE)
    (task,) = SplitImages(data_dir=str(tmp_path), renumber_labels=True, **WHOLE)
    assert _values(task.train) == _values(task.test)
    assert task.facts["class_names"] == names
    _flat(tmp_path, "test", datasets.Value(kind), [test[0], test[0]], [0, 0])
    with pytest.raises(UsageError, match="have no test samples"):
        SplitImages(data_dir=str(tmp_path), renumber_labels=True, **WHOLE)
    strange = "x" if kind == "string" else 77
    _flat(tmp_path, "test", datasets.Value(kind), [*test, strange], [0, 0, 0, 0])
    with pytest.raises(UsageError, match=f"test split has labels {strange} in column"):
        SplitImages(data_dir=str(tmp_path), renumber_labels=True, **WHOLE)


@pytest.mark.parametrize(("kind", "label"), [("int64", 0), ("string", "a")])
def test_a_missing_label_is_named_by_its_row(tmp_path, kind, label):
    import datasets

    _flat(tmp_path, "train", datasets.Value(kind), [label, None, None], [1, 2, 3])
    _flat(tmp_path, "test", datasets.Value(kind), [label], [1])
    with pytest.raises(
        UsageError, match=r"row 2 of the train split has no label \(2 rows in all\)"
    ):
        SplitImages(data_dir=str(tmp_path), renumber_labels=kind == "string", **WHOLE)


def test_folders_are_counted_as_people_count(tmp_path):
    for split, c in itertools.product(("train", "test"), range(12)):
        path = tmp_path / split / f"{c}" / "0.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(np.full((4, 4), 20 * c, np.uint8)).save(path)
    (task,) = SplitImages(data_dir=str(tmp_path), **WHOLE)
    assert _values(task.test) == {c: [20 * c] for c in range(12)}
    assert task.facts["class_names"] == [str(c) for c in range(12)]


def test_photos_stand_upright(tmp_path):
    """The tag of a camera that lay on its side turns the picture, and its size, back."""
    pixels = make_pixels(4, (6, 4, 3))
    for split, (i, image) in itertools.product(("train", "test"), enumerate(pixels)):
        path = tmp_path / split / f"kind{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        stored, tag = Image.fromarray(image), Image.Exif()
        if i >= 2:
            stored = stored.transpose(Image.Transpose.ROTATE_90)
            tag[0x0112] = 6  # turn by 270 degrees to see it as it was
        stored.save(path, exif=tag)
    stream = SplitImages(data_dir=str(tmp_path), **WHOLE)
    assert stream.input_shape == (3, 6, 4)
    found = everything(stream[0].train)["x"]
    expected = torch.from_numpy(pixels[[0, 2, 1, 3]]).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(found, expected)


def test_split_images_divides_all_classes_unless_told_otherwise(tmp_path):
    write_parquet(tmp_path / "data", {"train": list(range(20)) * 2, "test": list(range(20))})

    def sizes(**arguments):
        stream = SplitImages(data_dir=str(tmp_path / "data"), **arguments)
        return [len(task.classes) for task in stream]

    assert sizes() == [2] * 10
    assert sizes(classes_per_task=5) == [5] * 4
    assert sizes(num_tasks=4) == [5] * 4
    assert sizes(num_tasks=3, classes_per_task=5) == [5] * 3
    assert sizes(how="rotated") == [20] * 10


def test_data_decoded_on_fetch_travels_to_loader_workers(tmp_path):
    write_folder(tmp_path / "data", per_class=80)  # enough rows for several decoding threads
    stream = SplitImages(data_dir=str(tmp_path / "data"), num_tasks=1, in_memory=False)
    data = stream[0].train
    assert_same(everything(pickle.loads(pickle.dumps(data))), everything(data))


def test_another_test_split(tmp_path):
    write_folder(tmp_path / "data", split_sizes={"train": 4, "val": 3})
    stream = SplitImages(data_dir=str(tmp_path / "data"), num_tasks=2, test_split="val")
    assert [len(task.test) for task in stream] == [6, 6]
