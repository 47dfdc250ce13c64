"""The cache, data that is missing, and the real MNIST."""

import io
import os
import time
import warnings

import numpy as np
import pytest
import sklearn.datasets
import sklearn.utils
import torch
from conftest import DATA_AT_HAND
from pictures import assert_same, everything, make_pixels, write_folder, write_parquet
from PIL import Image

from cl_bench.contracts.errors import UsageError
from cl_bench.data import cached
from cl_bench.tasks.images import files
from cl_bench.tasks.images.decode import open_image
from cl_bench.tasks.pmnist import PMNIST
from cl_bench.tasks.rotated_mnist import RotatedMNIST
from cl_bench.tasks.split_images import SplitImages
from cl_bench.tasks.split_mnist import SplitMNIST

pytestmark = pytest.mark.usefixtures("cache")

MNIST = DATA_AT_HAND / "mnist"
needs_mnist = pytest.mark.skipif(not MNIST.is_dir(), reason=f"no MNIST in {MNIST}")


@pytest.fixture(scope="session")
def mnist_cache(tmp_path_factory):
    """One decoded MNIST for all tests that read it."""
    return tmp_path_factory.mktemp("mnist_cache")


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
def test_a_damaged_cache_file_is_noticed_and_made_anew(cache, damage):
    calls = []

    def build():
        calls.append(1)
        return {"a": torch.arange(1000, dtype=torch.uint8), "b": torch.tensor(3)}

    first = cached("key", build)
    assert_same(cached("key", build)[0], first[0])
    assert len(calls) == 1
    (path,) = cache.iterdir()
    DAMAGE[damage](path)
    with pytest.warns(UserWarning, match="damaged and is made anew"):
        again = cached("key", build)
    assert again[1] == first[1]
    assert_same(again[0], first[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(cached("key", build)[0], first[0])
    assert len(calls) == 2
    assert [p.name for p in cache.iterdir()] == [path.name], "no temporary files stay behind"


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


@needs_mnist
def test_split_mnist_in_a_frame_is_normalised_by_what_it_is_with_it(mnist_cache, monkeypatch):
    monkeypatch.setenv("CL_BENCH_CACHE", str(mnist_cache))
    options = {"data_dir": str(MNIST), "scenario": "class", "validation_fraction": 0.0}
    framed = SplitMNIST(**options, padding=2, mean=0.1, std=0.2752)
    plain = SplitMNIST(**options)
    assert (framed.input_shape, plain.input_shape) == ((1, 32, 32), (1, 28, 28))
    some = torch.arange(50)
    x, inner = framed[3].train[some]["x"], plain[3].train[some]["x"]
    torch.testing.assert_close(x[..., 2:-2, 2:-2] * 0.2752 + 0.1, inner * 0.3081 + 0.1307)
    frame = x.clone()
    frame[..., 2:-2, 2:-2] = -0.1 / 0.2752
    torch.testing.assert_close(frame, torch.full_like(frame, -0.1 / 0.2752))
    rows = [task.train[torch.arange(0, len(task.train), 20)]["x"] for task in framed]
    whole = torch.cat(rows).double()
    assert (len(whole), sum(len(task.train) for task in framed)) == (3003, 60000)
    assert float(whole.mean()) == pytest.approx(0, abs=0.01)
    assert float(whole.std()) == pytest.approx(1, abs=0.01)


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
