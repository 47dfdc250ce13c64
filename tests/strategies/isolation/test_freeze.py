"""Freeze: blocks that stay bit for bit, and what cannot be frozen."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from toys import DIM, learn, make_learner, make_stream

from cl_bench.contracts import UsageError
from cl_bench.strategies.isolation.freeze import Freeze


def normed():
    torch.manual_seed(1)
    block = functools.partial(nn.Sequential)
    return nn.Sequential(
        block(nn.Linear(DIM, 16), nn.BatchNorm1d(16), nn.ReLU()),
        nn.Dropout(0.1),
        block(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU()),
    )


@pytest.mark.parametrize(
    "optimizer",
    [functools.partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.1), functools.partial(Adam)],
)
@pytest.mark.parametrize("n_blocks", [0, 1, 2])
@pytest.mark.parametrize("start_task", [0, 1, 2])
def test_frozen_blocks_stay_bit_for_bit(optimizer, n_blocks, start_task):
    stream = make_stream()
    learner = make_learner(stream, normed(), optimizer)
    freeze = Freeze(n_blocks, start_task)
    blocks = learner.blocks()
    assert len(blocks) == 2
    for task in stream:
        before = [copy.deepcopy(block.state_dict()) for block in blocks]
        used = learn(learner, freeze, task, epochs=2)
        held = {id(p) for group in used.param_groups for p in group["params"]}
        for i, block in enumerate(blocks):
            frozen = i < n_blocks and task.index >= start_task
            for k, v in block.state_dict().items():
                assert torch.equal(v, before[i][k]) == frozen, k
            for p in block.parameters():
                assert (id(p) in held) != frozen
                assert (p in used.state) != frozen


def test_freezing_more_than_there_is_is_refused():
    stream = make_stream()
    learner = make_learner(stream, normed())
    with pytest.raises(UsageError, match=r"n_blocks=3.*2 blocks"):
        learner.begin(stream[0], Freeze(3))
    for options in ({"n_blocks": -1}, {"start_task": -1}):
        with pytest.raises(UsageError, match=r"=-1"):
            Freeze(**options)


def test_freezing_everything_leaves_nothing_to_train():
    stream = make_stream()
    learner = make_learner(stream, normed())
    learner.begin(stream[1], Freeze(2))
    assert learner.configure_optimizers()  # the head remains
    learner.heads.requires_grad_(False)
    with pytest.raises(UsageError, match=r"nothing is left to train.*freeze less"):
        learner.configure_optimizers()
