"""The streams of ``tasks/``: arrangement, data, caching, and what they say when data is missing."""

import gc
import hashlib
import importlib
import inspect
import io
import itertools
import os
import pickle
import time
import warnings
import weakref
from pathlib import Path

import hydra
import numpy as np
import pytest
import sklearn.datasets
import sklearn.utils
import torch
from conftest import DATA_AT_HAND
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from pictures import assert_same, everything, make_pixels, write_folder, write_parquet
from PIL import Image

from cl_bench.contracts import stream as contract
from cl_bench.contracts.errors import UsageError
from cl_bench.data import MemoryData, cached
from cl_bench.tasks.images import files
from cl_bench.tasks.images.arrange import pixel_orders
from cl_bench.tasks.images.decode import open_image
from cl_bench.tasks.images.views import Permutation, Rotation
from cl_bench.tasks.permuted_digits import PermutedDigits
from cl_bench.tasks.pmnist import PMNIST
from cl_bench.tasks.rotated_digits import RotatedDigits
from cl_bench.tasks.rotated_mnist import RotatedMNIST
from cl_bench.tasks.split_digits import SplitDigits
from cl_bench.tasks.split_images import SplitImages
from cl_bench.tasks.split_mnist import SplitMNIST

MNIST = DATA_AT_HAND / "mnist"
needs_mnist = pytest.mark.skipif(not MNIST.is_dir(), reason=f"no MNIST in {MNIST}")
CONFIGS = [
    Path(__file__).parents[2] / f"conf/stream/{name}.yaml"
    for name in (
        *("permuted_digits", "rotated_digits", "split_digits"),
        *("pmnist", "rotated_mnist", "split_mnist", "split_images"),
        *("split_cifar100", "cifar100_superclass", "five_datasets", "split_mini_imagenet"),
    )
]
MODELS = {
    "split_images": "cnn_small",
    "split_cifar100": "alexnet_cl",
    "cifar100_superclass": "lenet",
    "five_datasets": "resnet18_small",
    "split_mini_imagenet": "resnet18_small_84",
}
"""Default models of the streams that do not take the MLP."""
RESNETS = ("five_datasets", "split_mini_imagenet")
PLATEAUS = ("plateau", "plateau_resnet")
DIGITS = {
    "permuted": PermutedDigits,
    "rotated": RotatedDigits,
    "split": SplitDigits,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CL_BENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def mnist_cache(tmp_path_factory):
    """One decoded MNIST for all tests that read it."""
    return tmp_path_factory.mktemp("mnist_cache")


def undo_normalisation(task, x):
    view = task._train.view
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (view.moments.mean, view.moments.std))
    return (x * std + mean) * view.maximum


# --- the contract, for every embedded stream ------------------------------------------------------


@pytest.mark.parametrize("name", DIGITS)
def test_shapes_types_and_labels(name):
    stream = DIGITS[name]()
    assert stream.input_shape == (1, 8, 8)
    assert stream.scenario == ("task" if name == "split" else "domain")
    assert len(stream) == (5 if name == "split" else 10)
    assert stream.heads == ([2] * 5 if name == "split" else [10])
    for i, task in enumerate(stream):
        assert task.index == i
        assert task.origin.licence == "CC BY 4.0"
        for data in (task.train, task.validation, task.test):
            assert isinstance(data, contract.Data)
            batch = everything(data)
            assert batch["x"].shape == (len(data), 1, 8, 8)
            assert batch["x"].dtype == torch.float32
            assert batch["y"].dtype == torch.int64
            assert set(batch["y"].tolist()) == set(task.classes)
            assert ("task" in batch) == (name == "split")
            if "task" in batch:
                assert batch["task"].tolist() == [i] * len(data)


@pytest.mark.parametrize("name", DIGITS)
def test_streams_are_pure_functions_of_their_arguments(name):
    kind = DIGITS[name]
    torch.manual_seed(1)
    one = kind(order_seed=3)
    torch.manual_seed(2)
    np.random.seed(2)
    two = kind(order_seed=3)
    assert one.fingerprint == two.fingerprint
    for a, b in zip(one, two, strict=True):
        assert a.name == b.name
        for split in ("train", "validation", "test"):
            assert_same(everything(getattr(a, split)), everything(getattr(b, split)))


@pytest.mark.parametrize("name", DIGITS)
def test_sample_equals_the_base_definition_held_or_not(name):
    task = DIGITS[name]()[3]
    lazily = task.sample(40, seed=7)
    assert task._held is None, "sample must not make the training set"
    base = contract.Task.sample(task, 40, seed=7)
    assert_same(lazily, base)
    held = task.train
    assert_same(task.sample(40, seed=7), base)
    assert not torch.equal(task.sample(40, seed=8)["x"], base["x"])
    whole = task.sample(10**6, seed=7)
    assert len(whole["y"]) == len(held)
    assert sorted(whole["y"].tolist()) == sorted(held.tensors["y"].tolist())


def test_training_data_is_freed_when_nobody_holds_it():
    task = PermutedDigits()[0]
    data = task.train
    assert task.train is data
    before = everything(data)
    watch = weakref.ref(data)
    del data
    gc.collect()
    assert watch() is None
    assert_same(everything(task.train), before)


def test_test_and_validation_data_are_made_once():
    task = RotatedDigits()[1]
    assert task.test is task.test
    assert task.validation is task.validation


def test_memory_data_selects_rows_and_refuses_ragged_tensors():
    data = MemoryData({"x": torch.arange(12.0).view(4, 3), "y": torch.arange(4)})
    batch = data[torch.tensor([3, 1])]
    assert batch["x"].tolist() == [[9, 10, 11], [3, 4, 5]]
    assert batch["y"].tolist() == [3, 1]
    batch["x"].zero_()
    assert data.tensors["x"][3].tolist() == [9, 10, 11]
    with pytest.raises(ValueError, match="one common length"):
        MemoryData({"x": torch.zeros(3), "y": torch.zeros(2)})


# --- the digits -----------------------------------------------------------------------------------


def test_digits_are_split_once_and_for_all_by_class():
    task = PermutedDigits(num_tasks=1, identity_first=True, validation_fraction=0.0)[0]
    train, test = everything(task.train), everything(task.test)
    assert (len(train["y"]), len(test["y"]), len(task.validation)) == (1437, 360, 0)
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    for split, share in ((train, 0.8), (test, 0.2)):
        counts = torch.bincount(split["y"]).numpy()
        assert np.abs(counts - share * np.bincount(labels)).max() <= 1
    raw = undo_normalisation(task, torch.cat([train["x"], test["x"]])).round().flatten(1).numpy()
    rows = {(*image, label) for image, label in zip(raw, [*train["y"], *test["y"]], strict=True)}
    rows = {tuple(int(value) for value in row) for row in rows}
    assert rows == {(*map(int, i), int(n)) for i, n in zip(images, labels, strict=True)}
    assert not set(map(tuple, raw[:1437])) & set(map(tuple, raw[1437:]))
    assert torch.allclose(train["x"].mean(), torch.tensor(0.0), atol=1e-5)
    assert torch.allclose(train["x"].std(), torch.tensor(1.0), atol=1e-4)


@pytest.mark.parametrize("split", ["first", "random"])
@pytest.mark.parametrize("name", DIGITS)
def test_train_validation_and_test_are_disjoint_and_complete(name, split):
    for task in DIGITS[name](validation_split=split, validation_fraction=0.25):
        train, validation, test = task._train, task._validation, task._test
        rows = torch.cat([train.rows, validation.rows])
        assert len(rows.unique()) == len(rows)
        assert len(validation) == int(0.25 * len(rows))
        assert train.pixels is validation.pixels is not test.pixels
        if split == "first":
            assert validation.rows.max() < train.rows.min()
        else:
            assert validation.rows.max() > train.rows.min()


def test_random_validation_follows_order_seed_and_is_shared_by_tasks_on_the_same_images():
    one, two = PermutedDigits(order_seed=1), PermutedDigits(order_seed=2)
    assert torch.equal(one[0]._validation.rows, one[5]._validation.rows)
    assert not torch.equal(one[0]._validation.rows, two[0]._validation.rows)


# --- permuted -------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), pixels=st.sampled_from([64, 784]))
def test_pixel_orders_are_those_of_the_pmnist_code(seed, pixels):
    r = sklearn.utils.shuffle(list(range(10)), random_state=seed)
    for i, order in enumerate(pixel_orders(pixels, 10, seed)):
        expected = sklearn.utils.shuffle(np.arange(pixels), random_state=r[i] * 100 + i)
        assert order.tolist() == expected.tolist()


def test_pixel_orders_known_values():
    assert sklearn.utils.shuffle(list(range(10)), random_state=0) == [2, 8, 4, 9, 1, 6, 7, 3, 0, 5]
    expected = np.random.RandomState(8 * 100 + 1).permutation(784)
    assert pixel_orders(784, 2, 0)[1].tolist() == expected.tolist()
    assert len({tuple(order.tolist()) for order in pixel_orders(64, 100, 0)}) == 100


def test_fewer_tasks_are_a_prefix():
    few, many = pixel_orders(64, 3, 5), pixel_orders(64, 10, 5)
    assert all(torch.equal(a, b) for a, b in zip(few, many, strict=False))


def test_permutation_moves_all_channels_alike():
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    x = torch.arange(2 * 3 * 12).view(2, 3, 3, 4)
    y = Permutation(order)(x)
    for n in range(2):
        for c in range(3):
            assert y[n, c].flatten().tolist() == x[n, c].flatten()[order].tolist()


def test_permuted_tasks_are_the_plain_images_permuted():
    plain = everything(PermutedDigits(identity_first=True)[0].test)
    stream = PermutedDigits()
    for order, task in zip(pixel_orders(64, 10, 0), stream, strict=True):
        batch = everything(task.test)
        assert torch.equal(batch["x"].flatten(1), plain["x"].flatten(1)[:, order])
        assert torch.equal(batch["y"], plain["y"])
    assert not torch.equal(everything(stream[0].test)["x"], plain["x"]), "the first one too"


# --- rotated --------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("size", [8, 9])
def test_quarter_turns_equal_rot90(turns, size):
    x = torch.rand(5, 3, size, size, generator=torch.Generator().manual_seed(0)) * 255
    turned = Rotation(90.0 * turns)(x)
    assert torch.allclose(turned, torch.rot90(x, turns, (2, 3)), atol=255 * 1e-5)


def test_rotation_keeps_proportions_and_brings_in_black():
    # A vertical bar in a 9 x 21 image, turned by 90 degrees, must be as long as it was.
    x = torch.zeros(1, 1, 9, 21)
    x[0, 0, 2:7, 10] = 200.0
    turned = Rotation(90.0)(x)[0, 0]
    expected = torch.zeros(9, 21)
    expected[4, 8:13] = 200.0
    assert torch.allclose(turned, expected, atol=0.01)
    assert Rotation(45.0)(torch.full((1, 1, 8, 8), 255.0))[0, 0, 0, 0] == 0
    assert torch.equal(Rotation(0.0)(x), x)


def test_rotated_stream_angles_names_and_order():
    stream = RotatedDigits(num_tasks=4, max_angle=180.0)
    assert [task.name for task in stream] == ["rot_0", "rot_45", "rot_90", "rot_135"]
    plain, quarter = everything(stream[0].test)["x"], everything(stream[2].test)["x"]
    assert torch.allclose(quarter, torch.rot90(plain, 1, (2, 3)), atol=1e-4)
    orders = {
        tuple(task.name for task in RotatedDigits(angle_order="random", order_seed=seed))
        for seed in range(3)
    }
    assert len(orders) == 3
    assert len({frozenset(order) for order in orders}) == 1


# --- split by class -------------------------------------------------------------------------------


def test_random_class_order_is_remapped_to_positions():
    fixed = SplitDigits(validation_fraction=0.0)
    by_label = {}
    for task in fixed:
        batch = everything(task.test)
        for label in task.classes:
            by_label[label] = batch["x"][batch["y"] == label]
    stream = SplitDigits(class_order="random", order_seed=1, validation_fraction=0.0)
    order = [label for task in stream for label in task.labels]
    assert sorted(order) == list(range(10)) != order
    assert order != [x for t in SplitDigits(class_order="random", order_seed=2) for x in t.labels]
    for i, task in enumerate(stream):
        assert task.classes == range(2 * i, 2 * i + 2)
        assert task.head == i
        batch = everything(task.test)
        for position in task.classes:
            assert torch.equal(batch["x"][batch["y"] == position], by_label[order[position]])


@pytest.mark.parametrize(
    ("scenario", "heads", "classes", "has_id"),
    [
        ("task", [0, 1, 2, 3, 4], range(4, 6), True),
        ("class", [0, 1, 2, 3, 4], range(4, 6), False),
        ("domain", [0] * 5, range(2), False),
    ],
)
def test_scenarios(scenario, heads, classes, has_id):
    stream = SplitDigits(scenario=scenario)
    assert stream.scenario == scenario
    assert stream.task_id_at_test == has_id
    assert [task.head for task in stream] == heads
    assert stream[2].classes == classes
    batch = everything(stream[2].test)
    assert set(batch["y"].tolist()) == set(classes)
    assert ("task" in batch) == has_id


def test_classes_may_be_left_out_only_when_asked():
    stream = SplitDigits(num_tasks=3, classes_per_task=3)
    assert [task.name for task in stream] == ["classes_0-2", "classes_3-5", "classes_6-8"]
    assert len(SplitDigits(classes_per_task=5)) == 2
    assert SplitDigits(classes_per_task=1, scenario="class")[9].name == "class_9"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PermutedDigits(num_tasks=0), "stream.num_tasks=0: must lie in .1, 100"),
        (lambda: RotatedDigits(num_tasks=0), "stream.num_tasks=0"),
        (lambda: RotatedDigits(max_angle=0), "stream.max_angle=0"),
        (lambda: RotatedDigits(angle_order="up"), "stream.angle_order=up: use fixed or random"),
        (lambda: SplitDigits(3, None), "stream.num_tasks=3: .*10 classes; choose a divisor"),
        (lambda: SplitDigits(num_tasks=0), "stream.num_tasks=0"),
        (lambda: SplitDigits(None, 4), "stream.classes_per_task=4: .*choose a divisor"),
        (lambda: SplitDigits(None, None), "set stream.num_tasks or stream.classes_per_task"),
        (lambda: SplitDigits(6, 2), "stream.num_tasks=6: .*too few for 2 a task"),
        (lambda: SplitDigits(2, 11), "stream.classes_per_task=11: .*from 1 to 10"),
        (lambda: SplitDigits(10, None), "stream.scenario=task: one class a task"),
        (lambda: SplitDigits(scenario="head"), "stream.scenario=head: use domain, task or class"),
        (lambda: SplitDigits(class_order="x"), "stream.class_order=x"),
        (lambda: PermutedDigits(validation_fraction=1.0), r"stream.validation_fraction=1.0"),
        (lambda: PermutedDigits(validation_split="last"), "stream.validation_split=last"),
        (lambda: PermutedDigits(order_seed=-1), "stream.order_seed=-1"),
        (lambda: SplitImages(how="mixed"), "stream.how=mixed"),
        (lambda: SplitImages(how="split", max_angle=9), "stream.max_angle=9: has no effect"),
        (lambda: SplitImages(how="rotated", class_order="fixed"), "stream.class_order=fixed"),
        (lambda: SplitImages(how="permuted", scenario="task"), "stream.scenario=task: .*domain"),
        (lambda: SplitImages(mean=0.5), "stream.std=null: stream.mean is set"),
        (lambda: SplitImages(std=0.5), "stream.mean=null: stream.std is set"),
        (lambda: SplitImages(mean=0.5, std=0.0), "stream.std=0.0"),
        (lambda: SplitImages(image_size=0), "stream.image_size=0"),
        (lambda: SplitImages(dataset="a/b", data_dir="c"), "stream.dataset=a/b: data_dir is used"),
    ],
)
def test_arguments_out_of_range_name_the_key_and_the_remedy(make, message):
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_keys_and_values_are_the_constructors(path):
    config = OmegaConf.to_container(OmegaConf.load(path))["stream"]
    module, name = config.pop("_target_").rsplit(".", 1)
    assert module == f"cl_bench.tasks.{path.stem}"
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    defaults = {key: parameter.default for key, parameter in parameters.items()}
    assert config == {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()}
    header, command, description, *_ = path.read_text().splitlines()
    assert header == "# @package _global_", "Hydra reads the package from the first line only"
    assert command.startswith("# python -m cl_bench ")
    assert f"+stream={path.stem}" in command
    assert description.startswith("# ")


def test_configs_compose_and_leave_the_users_choice(tmp_path):
    """Alone with Hydra, so that only these files can fail it."""
    written = {
        "config.yaml": "defaults: [_self_, {model: other}, {optimizer: other}, {schedule: other}]\n"
        "batch_size: 1\ntrainer: {max_epochs: 1}\n",
        **{
            f"{group}/{name}.yaml": f"name: {name}\n"
            for group in ("model", "optimizer", "schedule")
            for name in ("mlp", *MODELS.values(), "sgd", "sgd_resnet", *PLATEAUS, "other")
        },
        **{f"stream/{path.name}": path.read_text() for path in CONFIGS},
    }
    for name, text in written.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with hydra.initialize_config_dir(str(tmp_path), version_base=None):
        for path in CONFIGS:
            config = hydra.compose("config", [f"+stream={path.stem}", "stream.order_seed=2"])
            model = MODELS.get(path.stem, "mlp")
            optimizer = "sgd_resnet" if path.stem in RESNETS else "other"
            assert (config.model.name, config.optimizer.name) == (model, optimizer)
            plateau = PLATEAUS[path.stem in RESNETS]
            of_papers = path.stem in MODELS and path.stem != "split_images"
            assert config.schedule.name == (plateau if of_papers else "other")
            assert config.stream.order_seed == 2
            config = hydra.compose("config", [f"+stream={path.stem}", "model=other"])
            assert config.model.name == "other"
        config = hydra.compose("config", ["+stream=split_digits", "stream.num_tasks=2"])
        stream = hydra.utils.instantiate(config.stream)
        assert [task.name for task in stream] == ["classes_0-1", "classes_2-3"]
        config = hydra.compose("config", ["+stream=pmnist"])
        assert (config.batch_size, config.trainer.max_epochs) == (10, 5)


# --- folders of images, parquet -------------------------------------------------------------------


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


# --- the cache ------------------------------------------------------------------------------------


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 255
    path.write_bytes(content)


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "one byte": flip,
    "garbage": lambda path: path.write_bytes(b"\xff" * 100),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_file_is_noticed_and_made_anew(own_cache, damage):
    calls = []

    def build():
        calls.append(1)
        return {"a": torch.arange(1000, dtype=torch.uint8), "b": torch.tensor(3)}

    first = cached("key", build)
    assert_same(cached("key", build)[0], first[0])
    assert len(calls) == 1
    (path,) = own_cache.iterdir()
    DAMAGE[damage](path)
    with pytest.warns(UserWarning, match="damaged and is made anew"):
        again = cached("key", build)
    assert again[1] == first[1]
    assert_same(again[0], first[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(cached("key", build)[0], first[0])
    assert len(calls) == 2
    assert [p.name for p in own_cache.iterdir()] == [path.name], "no temporary files stay behind"


def test_a_second_start_decodes_nothing(tmp_path, monkeypatch):
    write_folder(tmp_path / "data")
    arguments = {"data_dir": str(tmp_path / "data"), "num_tasks": 2}
    first = SplitImages(**arguments)

    def never(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr("cl_bench.tasks.images.decode.open_image", never)
    assert_same(everything(SplitImages(**arguments)[1].train), everything(first[1].train))


def test_the_cache_follows_the_content_not_the_date(tmp_path):
    write_folder(tmp_path / "data")
    arguments = {"data_dir": str(tmp_path / "data"), "num_tasks": 2}
    before = SplitImages(**arguments).fingerprint
    path = tmp_path / "data/train/kind0/0001.png"
    status = path.stat()
    pixels = np.asarray(Image.open(path)).copy()
    size = len(path.read_bytes())
    for value in range(256):  # another image in as many bytes
        pixels[0, 0, 0] = value
        Image.fromarray(pixels).save(path)
        if path.stat().st_size == size and SplitImages(**arguments).fingerprint != before:
            break
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == size
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    assert SplitImages(**arguments).fingerprint != before


def test_an_unwritable_cache_only_warns(tmp_path, monkeypatch):
    write_folder(tmp_path / "data")
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("CL_BENCH_CACHE", str(tmp_path / "file/cache"))
    with pytest.warns(UserWarning, match="cannot write the cache .*CL_BENCH_CACHE"):
        stream = SplitImages(data_dir=str(tmp_path / "data"), num_tasks=2)
    assert len(stream[0].test) == 4
    write_parquet(tmp_path / "p", {"train": [0, 1] * 3, "test": [0, 1]})
    with pytest.raises(UsageError, match=r"stream.in_memory=false: .*CL_BENCH_CACHE"):
        SplitImages(data_dir=str(tmp_path / "p"), classes_per_task=2, in_memory=False)


# --- missing data ---------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """The hub as from a machine without network, whatever this machine has."""
    import datasets

    def refuse(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    for variable in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.lower(), raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    return tmp_path / "hf"


@pytest.mark.parametrize(
    ("make", "hub_id", "alternative"),
    [
        (PMNIST, "ylecun/mnist", "permuted_digits"),
        (RotatedMNIST, "ylecun/mnist", "rotated_digits"),
        (SplitMNIST, "ylecun/mnist", "split_digits"),
        (lambda: SplitImages("org/photos", how="rotated"), "org/photos", "rotated_digits"),
    ],
)
def test_missing_data_is_an_error_at_once(no_network, make, hub_id, alternative):
    start = time.monotonic()
    with pytest.raises(UsageError) as caught:
        make()
    assert time.monotonic() - start < 5, "datasets alone retries for more than 20 s"
    message = str(caught.value)
    assert message.startswith("stream.data_dir=null: ")
    for part in (hub_id, "train*.parquet", "test/<class>/*.png", f"+stream={alternative}"):
        assert part in message
    assert "the hub cannot be reached" in message


def test_offline_mode_is_left_as_it_was(no_network):
    import datasets

    with pytest.raises(UsageError):
        PMNIST()
    assert datasets.config.HF_HUB_OFFLINE is False


def test_a_folder_without_data_says_what_is_in_it(tmp_path):
    with pytest.raises(UsageError, match=r"no such folder.*ylecun/mnist.*permuted_digits"):
        PMNIST(data_dir=str(tmp_path / "nowhere"))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UsageError, match="found an empty folder there"):
        PMNIST(data_dir=str(empty))
    (empty / "train.parquet").write_bytes(b"")
    (empty / "notes").mkdir()
    with pytest.raises(UsageError, match=r"found notes/, train.parquet there"):
        PMNIST(data_dir=str(empty))
    (empty / "test.parquet").write_bytes(b"")
    with pytest.raises(UsageError, match="parquet files there cannot be read"):
        PMNIST(data_dir=str(empty))
    with pytest.raises(UsageError, match=r"neither stream.data_dir nor stream.dataset"):
        SplitImages()
    with pytest.raises(UsageError, match=r"this is a local path; use stream.data_dir="):
        SplitImages(dataset=str(empty))


def test_other_images_are_not_taken_for_mnist(tmp_path):
    write_folder(tmp_path / "data")
    with pytest.raises(UsageError, match=r"MNIST has 10 classes .* this data has 4 of 6x5"):
        PMNIST(data_dir=str(tmp_path / "data"))


@pytest.fixture
def downloaded(no_network, tmp_path):
    """A data set in the hub's cache, as an earlier download leaves it: ``org/photos @ 5ea5e``."""
    import datasets

    labels = {"train": [0, 1, 2, 3] * 5, "test": [0, 1, 2, 3]}
    pixels = write_parquet(tmp_path / "photos", labels)
    names = {split: str(tmp_path / f"photos/{split}.parquet") for split in labels}
    datasets.load_dataset("parquet", data_files=names, cache_dir=str(tmp_path / "made"))
    (made,) = {path.parent for path in (tmp_path / "made").rglob("dataset_info.json")}
    target = no_network / "org___photos/default/0.0.0/5ea5e"
    target.parent.mkdir(parents=True)
    made.rename(target)
    for path in target.glob("parquet-*.arrow"):
        path.rename(target / path.name.replace("parquet", "photos"))
    info = target / "dataset_info.json"
    info.write_text(
        info.read_text().replace('"dataset_name": "parquet"', '"dataset_name": "photos"')
    )
    return pixels


def test_what_was_downloaded_before_works_without_network(downloaded):
    stream = SplitImages("org/photos", num_tasks=2, mean=0.0, std=1.0)
    assert stream[0].origin.source == "org/photos"
    expected = torch.from_numpy(downloaded["test"]).permute(0, 3, 1, 2).float() / 255
    assert torch.equal(torch.cat([everything(task.test)["x"] for task in stream]), expected)
    assert len(SplitImages("org/photos", revision="5ea5e", num_tasks=2)) == 2
    with pytest.raises(UsageError, match=r"stream.revision=0ther \(it is 5ea5e\)"):
        SplitImages("org/photos", revision="0ther", num_tasks=2)
    with pytest.raises(UsageError, match=r"has splits \['test', 'train'\].*stream.test_split"):
        SplitImages("org/photos", num_tasks=2, test_split="validation")


def test_a_hub_that_answers_is_not_asked_offline(monkeypatch):
    import datasets

    seen = []

    def load_dataset(*arguments, **options):
        seen.append((arguments, options, datasets.config.HF_HUB_OFFLINE))
        raise ValueError("Config name is missing.\nPlease pick one")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(files, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UsageError, match=r"ValueError: Config name is missing\.\)") as caught:
        SplitImages("org/photos", revision="main", config_name="small")
    assert seen == [(("org/photos", "small"), {"revision": "main"}, False)]
    assert "cannot be reached" not in str(caught.value)


# --- the real MNIST -------------------------------------------------------------------------------


@needs_mnist
def test_pmnist_is_the_published_protocol(mnist_cache, monkeypatch):
    monkeypatch.setenv("CL_BENCH_CACHE", str(mnist_cache))
    import pyarrow.parquet as pq

    stream = PMNIST(data_dir=str(MNIST), order_seed=2)
    assert (len(stream), stream.scenario, stream.heads) == (10, "domain", [10])
    r = sklearn.utils.shuffle(list(range(10)), random_state=2)
    table = pq.read_table(MNIST / "train.parquet").slice(0, 6002)
    raw = [row["bytes"] for row in table["image"].to_pylist()]
    images = [np.asarray(Image.open(io.BytesIO(raw[row]))) for row in (0, 1, 6000, 6001)]
    for i in (0, 7):
        task = stream[i]
        train, validation = task.train, task.validation
        assert (len(train), len(validation), len(task.test)) == (54000, 6000, 10000)
        assert train.tensors["x"].shape == (54000, 1, 28, 28)
        got = [validation.tensors["x"][0], validation.tensors["x"][1], *train.tensors["x"][:2]]
        for x, image in zip(got, images, strict=True):
            aux = (
                ((torch.from_numpy(image.copy()).float() / 255 - 0.1307) / 0.3081).view(-1).numpy()
            )
            aux = sklearn.utils.shuffle(aux, random_state=r[i] * 100 + i)
            assert np.array_equal(x.flatten().numpy(), aux)
        assert validation.tensors["y"].tolist() == table["label"].to_pylist()[:6000]
    counts = torch.bincount(torch.cat([train.tensors["y"], validation.tensors["y"]]))
    assert counts.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


@needs_mnist
def test_rotated_and_split_mnist_share_the_decoded_images(mnist_cache, monkeypatch):
    monkeypatch.setenv("CL_BENCH_CACHE", str(mnist_cache))
    split = SplitMNIST(data_dir=str(MNIST))
    rotated = RotatedMNIST(data_dir=str(MNIST), num_tasks=4)
    kept = [p for p in mnist_cache.glob("*.safetensors") if not p.stem.endswith("-names")]
    assert len(kept) == 1
    assert split.fingerprint == rotated.fingerprint
    assert split.heads == [2] * 5
    assert [task.name for task in split] == [f"classes_{2 * i}-{2 * i + 1}" for i in range(5)]
    assert sum(len(task.test) for task in split) == 10000
    assert sum(len(t._train) + len(t._validation) for t in split) == 60000
    plain, quarter = rotated[0].sample(200, 0), rotated[2].sample(200, 0)
    assert plain["x"].shape == (200, 1, 28, 28)
    assert not torch.equal(plain["y"], quarter["y"]), "each task draws its own sample"
    some = torch.arange(100)
    turned = torch.rot90(rotated[0].test[some]["x"], 1, (2, 3))
    assert torch.allclose(rotated[2].test[some]["x"], turned, atol=1e-4)


def test_images_come_from_the_folder_that_was_named(tmp_path):
    """A parquet file of somebody else's may name any file, or none."""
    inside = tmp_path / "data" / "a.png"
    inside.parent.mkdir()
    Image.fromarray(make_pixels(1, (4, 4))[0]).save(inside)
    outside = tmp_path / "secret.png"
    inside.rename(outside)
    Image.fromarray(make_pixels(1, (4, 4))[0]).save(inside)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    for root in (tmp_path / "data", tmp_path / "link"):
        assert open_image({"bytes": None, "path": str(inside)}, 0, root).size == (4, 4)
        for path in (outside, root / ".." / "secret.png"):
            with pytest.raises(UsageError, match=r"image 3 .* is a file outside of"):
                open_image({"bytes": None, "path": str(path)}, 3, root)
    for cell in (None, {"bytes": None, "path": None}, {"bytes": b"", "path": ""}):
        with pytest.raises(UsageError, match="image 3 of the stream's data is missing"):
            open_image(cell, 3)
