"""What processes share out goes into files by rows, whole or not there, and comes back."""

import shutil

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from cl_bench.experiment import Checkpoints, CheckpointSettings
from cl_bench.experiment.checkpoint import FORMAT, DamagedError, read_checkpoint
from cl_bench.parallel.stored import Stored, resolved
from cl_bench.tracking.aside import Aside


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def kept(tmp_path):
    return Checkpoints(tmp_path, CheckpointSettings(keep=1), apart=True)


def state(mesh, seed, start=None):
    torch.manual_seed(seed)
    weight = distribute_tensor(torch.randn(5, 3), mesh, [Shard(0)])
    inside = {
        "weights": {"w": weight, "tied": weight, "buffer": torch.arange(3)},
        "list": [weight * 2, 4.0],
    }
    made = {"format": FORMAT, "task": 1, "step": seed, "start": start, "inside": inside}
    return made | {"random": None, "position": 0}


def folders(kept):
    return sorted(p.name for p in kept.directory.glob("*.rows"))


def test_rows_come_back_whole_and_as_rows(mesh, kept):
    given = state(mesh, 7)
    kept.save(1, 7, given)
    weight = given["inside"]["weights"]["w"].full_tensor()
    (path,) = kept.paths()
    whole = read_checkpoint(path)["inside"]
    assert torch.equal(whole["weights"]["w"], weight)
    assert torch.equal(whole["weights"]["tied"], weight)
    assert torch.equal(whole["list"][0], 2 * weight)
    assert whole["list"][1] == 4.0
    assert whole["weights"]["buffer"].tolist() == [0, 1, 2]
    apart = kept.read(path).state["inside"]["weights"]["w"]
    assert isinstance(apart, Stored)
    assert torch.equal(resolved(apart, mesh).to_local(), weight)
    (file,) = path.with_suffix(".rows").glob("*")
    assert torch.equal(load_file(file)["inside.weights.w"], weight)  # no pickle: anybody reads it


def test_where_a_task_began_is_written_once_and_stays_as_long_as_it_is_needed(mesh, kept):
    begun = kept.save(1, 0, state(mesh, 0))["inside"]
    kept.save(1, 4, state(mesh, 4, begun))
    kept.save(1, 8, state(mesh, 8, begun))
    assert folders(kept) == ["task0001-step000000000.rows", "task0001-step000000008.rows"]
    found = read_checkpoint(kept.paths()[-1])
    torch.manual_seed(0)
    assert torch.equal(found["start"]["weights"]["w"], torch.randn(5, 3))
    kept.save(2, 0, state(mesh, 1))
    assert folders(kept) == ["task0002-step000000000.rows"]


def test_a_damaged_or_missing_file_is_seen(mesh, kept):
    kept.save(1, 7, state(mesh, 7))
    (path,) = kept.paths()
    (file,) = path.with_suffix(".rows").glob("*")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedError, match="have changed"):
        read_checkpoint(path)
    content[-1] ^= 1
    file.write_bytes(content)
    read_checkpoint(path)
    other = file.with_name("shard-00002-model-00001-of-00001.safetensors")
    shutil.copy(file, other)
    with pytest.raises(DamagedError, match="has besides shard-00002"):
        read_checkpoint(path)
    other.unlink()
    file.unlink()
    with pytest.raises(DamagedError, match="lacks shard-00001"):
        read_checkpoint(path)


def test_what_a_killed_run_left_half_written_is_no_checkpoint(mesh, kept, tmp_path):
    kept.save(1, 4, state(mesh, 4))
    (first,) = kept.paths()
    half = kept.directory / ".task0001-step000000008.rows.tmp"
    shutil.copytree(first.with_suffix(".rows"), half)
    without_index = kept.directory / "task0001-step000000008.rows"
    shutil.copytree(half, without_index)
    found = kept.newest(lambda _: None, print)
    assert found.path == first
    kept.set_aside_after(found, Aside(tmp_path))
    assert not half.exists()
    assert folders(kept) == [f"{first.stem}.rows"]
    kept.save(1, 8, state(mesh, 8))  # over what stood in its place
    assert read_checkpoint(kept.paths()[-1])["step"] == 8
