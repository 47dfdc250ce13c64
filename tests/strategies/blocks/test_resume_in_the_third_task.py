"""A run that is killed inside its third task and goes on leaves what a whole one does."""

import functools

import pytest
from dying import die, learn, same
from torch.optim import SGD
from transformers_small import MADE, vit


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
def test_killed_in_the_third_task(name, tmp_path):
    # SLCA takes further batches in the second and third tasks: its alignment.
    more = 2 * -(-6 * 8 // 10) if name == "slca" else 0
    options = {
        "model": vit,
        "scenario": "class",
        "epochs": 2,
        "optimizer": functools.partial(SGD, lr=0.1, momentum=0.9),
    }
    learn(tmp_path / "whole", MADE[name], **options)
    die(tmp_path / "killed", MADE[name], dies_at=2 * 10 + more + 7, **options)
    learn(tmp_path / "killed", MADE[name], resume=True, **options)
    same(tmp_path / "whole", tmp_path / "killed")
    if more:
        die(tmp_path / "aligning", MADE[name], dies_at=2 * 10 + more + 15, **options)
        learn(tmp_path / "aligning", MADE[name], resume=True, **options)
        same(tmp_path / "whole", tmp_path / "aligning")
