"""The disk that a run will take is known before it starts."""

import functools
import shutil
from collections import namedtuple

import pytest
from torch.optim import SGD, Adam
from toys import make_learner, make_stream, mlp

from cl_bench import run
from cl_bench.contracts import UsageError
from cl_bench.experiment import CheckpointSettings
from cl_bench.experiment.disk import disk, states

Usage = namedtuple("Usage", "total used free")


def test_what_stays_and_what_is_being_written_is_added_up(tmp_path):
    learner = make_learner(make_stream(), mlp(bias=True))
    trained = 4 * sum(p.numel() for p in learner.parameters())
    own = sum(t.numel() * t.element_size() for t in learner.state_dict().values())
    adam, plain = functools.partial(Adam, lr=0.1), functools.partial(SGD, lr=0.1)

    def of(optimizer, **settings):
        found = disk(learner, optimizer, CheckpointSettings(**settings), 3, tmp_path / "a" / "b")
        return found.weights, found.checkpoints

    assert of(plain, every_steps=None) == (4 * own, 3 * own)
    assert of(plain, keep=1) == (4 * own, 2 * 2 * own)
    assert of(adam, keep=1, weights="last") == (0, 2 * (2 * own + 2 * trained))
    assert of(adam, enabled=False) == (0, 0)
    assert (states(plain), states(functools.partial(plain, momentum=0.9)), states(adam)) == (
        0,
        1,
        2,
    )


def test_a_run_that_the_disk_has_no_room_for_does_not_start(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(UsageError, match=r"will take .*checkpoint\.weights=last.*another run_dir"):
        run(
            "permuted_digits",
            "finetune",
            overrides=["logger.mode=disabled"],
            run_dir=tmp_path / "run",
        )
    assert not (tmp_path / "run" / "results.jsonl").exists()
