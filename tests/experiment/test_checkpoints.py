"""Checkpoints: which there are, what is in them, and those that are damaged or missing."""

import functools
import json

import pytest
import torch
from dying import companions, die, learn, momentum, names, same
from torch.optim import Adam
from torch.optim.lr_scheduler import MultiStepLR
from toys import make_stream

from cl_bench.contracts import Strategy, UsageError
from cl_bench.experiment import CheckpointSettings, TrainLoader
from cl_bench.experiment.checkpoint import (
    FORMAT,
    Checkpoints,
    DamagedError,
    read_checkpoint,
    write_checkpoint,
)
from cl_bench.experiment.snapshot import copied, plain, random_states, set_random_states, sharing
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.strategies.replay.er import ER
from cl_bench.tracking import read_results

pytestmark = pytest.mark.usefixtures("no_pictures")

# --- going on inside a task -----------------------------------------------------------------------


adam = functools.partial(Adam, lr=1e-2)

gpm = functools.partial(GPM, samples=20)

er = functools.partial(ER, memory=30)

steps = functools.partial(MultiStepLR, milestones=[1, 2], gamma=0.5)


# --- which checkpoints there are ------------------------------------------------------------------


def test_the_newest_checkpoints_stay(tmp_path):
    learn(tmp_path / "two")
    assert names(tmp_path / "two") == [
        "task0002-step000000012.pt",
        "task0003-step000000000.pt",
    ]
    learn(tmp_path / "all", keep=100)
    # 15 steps a task; what is due at the end of an epoch waits for the next one to begin.
    assert names(tmp_path / "all") == [
        f"task{task:04}-step{step:09}.pt"
        for task, steps in ((0, (0, 4, 8, 12)), (1, (0, 4, 8, 12)), (2, (0, 4, 8, 12)), (3, (0,)))
        for step in steps
    ]
    learn(tmp_path / "ends", keep=100, every=None)
    assert names(tmp_path / "ends") == [f"task{t:04}-step000000000.pt" for t in range(4)]
    summary = json.loads((tmp_path / "all" / "summary.json").read_text())
    # In plain SGD all that a checkpoint holds are weights, now and before, and the observer's.
    sizes = [p.stat().st_size for p in (tmp_path / "all" / "checkpoints").iterdir()]
    assert max(sizes) / 4 < summary["checkpoint_bytes"] < max(sizes)
    assert 0 < summary["checkpoint_seconds"] < summary["wall_seconds"]


def test_a_kill_between_writing_and_letting_go_leaves_none_too_many(tmp_path, monkeypatch):
    learn(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_let_go", lambda self: None)
        die(tmp_path / "run", dies_at=31)
    assert len(names(tmp_path / "run")) > 2
    learn(tmp_path / "run", resume=True)
    same(tmp_path / "whole", tmp_path / "run")


def test_what_is_due_at_the_end_of_an_epoch_waits_for_the_next(tmp_path):
    learn(tmp_path / "run", every=5, keep=100)
    assert [n for n in names(tmp_path / "run") if n.startswith("task0001")] == [
        f"task0001-step{step:09}.pt" for step in (0, 5, 10)
    ]
    state = read_checkpoint(tmp_path / "run" / "checkpoints" / "task0001-step000000010.pt")
    assert (state["inside"]["epoch"], state["inside"]["position"]) == (2, 0)
    events = [e["event"] for e in read_results(tmp_path / "run")]
    recorded = (tmp_path / "run" / "results.jsonl").read_bytes()[: int(state["position"])]
    assert recorded.count(b'"event": "epoch"') == 5
    assert events.count("epoch") == 9


def test_a_checkpoint_is_plain_and_loads_anywhere(tmp_path):
    learner, _ = learn(tmp_path / "run", companions, optimizer=adam, keep=100)
    for path in Checkpoints(tmp_path / "run", CheckpointSettings()).paths():
        state = torch.load(path, weights_only=True)
        assert state["format"] == FORMAT
    for name, value in learner.state_dict().items():
        assert torch.equal(state["start"]["weights"][name], value)
    assert state["task"] == 3
    assert state["inside"] is None


def test_what_a_task_does_not_change_is_stored_once(tmp_path):
    learn(tmp_path / "run", gpm, keep=100)
    state = torch.load(
        tmp_path / "run" / "checkpoints" / "task0002-step000000004.pt", weights_only=True
    )
    start, inside = (state[k]["strategy"]["memory"] for k in ("start", "inside"))
    assert start
    for name, basis in start.items():
        assert basis.untyped_storage().data_ptr() == inside[name].untyped_storage().data_ptr()
    before, now = (state[k]["weights"]["backbone.fc1.weight"] for k in ("start", "inside"))
    assert not torch.equal(before, now)


def test_settings_are_checked():
    with pytest.raises(UsageError, match=r"checkpoint\.every_steps=0"):
        CheckpointSettings(every_steps=0)
    with pytest.raises(UsageError, match=r"checkpoint\.keep=0"):
        CheckpointSettings(keep=0)


# --- damaged and missing checkpoints --------------------------------------------------------------


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def replace(path):
    torch.save({"format": FORMAT}, path)


DAMAGE = {
    flip: "contents have changed",
    cut: "ends too early",
    halve: "ends too early",
    empty: "only 0 bytes",
    replace: "ends too early",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_of_damaged_checkpoints_the_one_before_is_used(tmp_path, capsys, damage):
    options = {"strategy": er, "optimizer": momentum}
    learn(tmp_path / "whole", **options)
    die(tmp_path / "run", dies_at=26, **options)
    before, newest = names(tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / newest
    damage(path)
    with pytest.raises(DamagedError, match=DAMAGE[damage]):
        read_checkpoint(path)
    learn(tmp_path / "run", resume=True, **options)
    said = capsys.readouterr().out
    assert f"{newest} is damaged" in said
    assert f"resumed from {before}" in said
    same(tmp_path / "whole", tmp_path / "run")


def test_a_checkpoint_that_the_record_lags_behind_is_passed_over(tmp_path, capsys):
    learn(tmp_path / "whole", er)
    die(tmp_path / "run", er, dies_at=31)
    older, newest = (tmp_path / "run" / "checkpoints" / name for name in names(tmp_path / "run"))
    results = tmp_path / "run" / "results.jsonl"
    results.write_bytes(results.read_bytes()[: read_checkpoint(older)["position"]])
    learn(tmp_path / "run", er, resume=True)
    assert f"{newest} cannot be used ({results} is shorter" in capsys.readouterr().out
    same(tmp_path / "whole", tmp_path / "run")


def test_another_format_is_not_read(tmp_path):
    with (tmp_path / "x.pt").open("w+b") as file:
        write_checkpoint(file, {"format": 99})
    with pytest.raises(UsageError, match=r"has format 99, and this version .* reads 2"):
        read_checkpoint(tmp_path / "x.pt")


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    learn(tmp_path / "whole", gpm)
    with monkeypatch.context() as patch:
        original = torch.save

        def full(state, file):
            if state["task"] == 1 and state["step"] == 8:
                file.write(b"PK")
                file.file = FullFile()
            original(state, file)

        patch.setattr(torch, "save", full)
        with pytest.raises(UsageError, match=r"cannot write .*task0001.*No space") as caught:
            learn(tmp_path / "run", gpm)
    assert any("resume=" in note for note in caught.value.__notes__)
    assert names(tmp_path / "run") == ["task0001-step000000000.pt", "task0001-step000000004.pt"]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    learn(tmp_path / "run", gpm, resume=True)
    same(tmp_path / "whole", tmp_path / "run")


class FullFile:
    def write(self, content):
        raise OSError(28, "No space left on device")


def test_state_that_could_not_be_loaded_is_refused_when_it_is_saved(tmp_path):
    class Secretive(Strategy):
        def state_dict(self):
            return {"memory": [torch.zeros(1), {"what": object()}]}

    with pytest.raises(UsageError, match=r"strategy\.memory\[1\]\.what is a object"):
        learn(tmp_path / "run", Secretive)


# --- the pieces -----------------------------------------------------------------------------------


def test_random_states_come_back():
    import random

    import numpy as np

    def draw():
        return torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist(), random.gauss()

    random.gauss()
    np.random.randn()
    state = plain(random_states(), "")
    first = draw()
    set_random_states(state)
    assert draw() == first


def test_copies_keep_strides():
    wide = torch.arange(12.0).reshape(3, 4)
    made = copied({"t": wide.t(), "slice": wide[:, 1:3], "deep": [{"x": wide[0].expand(2, 4)}]})
    assert made["t"].stride() == (1, 4)
    assert made["slice"].stride() == (4, 1)
    assert torch.equal(made["slice"], wide[:, 1:3])
    wide += 1
    assert made["t"][0, 0] == 0
    assert made["deep"][0]["x"][1, 3] == 3


def test_tensors_are_shared_only_if_every_bit_is_the_same():
    zero, minus = torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0])
    new = {"a": zero.clone(), "b": minus, "c": [zero.double()], "d": zero}
    old = {"a": zero, "b": zero, "c": [zero], "e": zero}
    shared = sharing(old, new)
    assert shared["a"] is new["a"]
    assert shared["b"] is zero
    assert shared["c"][0] is zero
    assert shared["e"] is zero


def test_a_loader_begins_where_it_is_told():
    task = make_stream(n=44)[1]

    def batches(loader):
        return [batch["x"] for batch in loader]

    whole = TrainLoader(task.train, 10, 0, 1, pack=2)
    epochs = [batches(whole) for _ in range(3)]
    later = TrainLoader(task.train, 10, 0, 1, pack=2)
    later.resume_at(1, 1)
    assert len(later) == len(whole) == 3
    for expected in (epochs[1][1:], epochs[2]):
        for a, b in zip(batches(later), expected, strict=True):
            assert torch.equal(a, b)
