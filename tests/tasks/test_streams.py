"""The embedded streams: the contract, digits, permuted, rotated, split by class."""

import gc
import importlib
import inspect
import weakref
from pathlib import Path

import hydra
import numpy as np
import pytest
import scipy.stats
import sklearn.datasets
import sklearn.utils
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from pictures import assert_same, everything

from cl_bench.contracts import stream as contract
from cl_bench.contracts.errors import UsageError
from cl_bench.data import MemoryData
from cl_bench.tasks.digits import load_digits
from cl_bench.tasks.images.arrange import Holdout, pixel_orders, rotated_tasks
from cl_bench.tasks.images.views import Permutation, Rotation
from cl_bench.tasks.permuted_digits import PermutedDigits
from cl_bench.tasks.rotated_digits import RotatedDigits
from cl_bench.tasks.split_digits import SplitDigits
from cl_bench.tasks.split_images import SplitImages

pytestmark = pytest.mark.usefixtures("cache")

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


def test_angles_can_be_drawn():
    """Uniform below the greatest, by the seed alone, and no two alike."""
    found = {}
    for seed in (3, 4):
        holdout = Holdout(0.0, "first", seed)
        tasks = rotated_tasks(load_digits(), 60, seed, holdout, 90.0, "fixed", "uniform")
        found[seed] = [task._train.view.arrange.degrees for task in tasks]
    again = rotated_tasks(load_digits(), 20, 3, holdout, 180.0, "fixed", "uniform")
    assert [task._train.view.arrange.degrees for task in again] == [2 * a for a in found[3][:20]]
    for angles in found.values():
        assert min(angles) >= 0
        assert max(angles) < 90
        assert len(set(angles)) == 60
        assert angles != sorted(angles)
        assert scipy.stats.kstest(angles, "uniform", (0, 90)).pvalue > 0.01
    assert found[3] != found[4]
