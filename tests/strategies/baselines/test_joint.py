"""Joint training and fine-tuning."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import SGD
from toys import (
    CLASSES,
    Silent,
    ToyTask,
    learn,
    learn_stream,
    make_engine,
    make_learner,
    make_stream,
    weights,
)

from cl_bench.contracts import UsageError
from cl_bench.data import MemoryData
from cl_bench.experiment import EvalSettings, Experiment
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.baselines.joint import Joint, Union


@settings(max_examples=30)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 100))
def test_union_is_all_parts_in_order(sizes, seed):
    y = torch.arange(sum(sizes))
    x = torch.randn(sum(sizes), 3)
    parts = [
        MemoryData({"x": a, "y": b}) for a, b in zip(x.split(sizes), y.split(sizes), strict=True)
    ]
    union = Union(parts)
    assert len(union) == len(y)
    rng = torch.Generator().manual_seed(seed)
    for index in (
        torch.randperm(len(y), generator=rng),
        torch.randint(len(y), (2 * len(y),), generator=rng),
    ):
        batch = union[index]
        assert torch.equal(batch["y"], y[index])
        assert torch.equal(batch["x"], x[index])


def test_joint_learns_the_union_of_what_was_seen():
    stream = make_stream("task")
    for t in range(3):
        data = Joint().plan(stream, t).data
        everything = data[torch.arange(len(data))]
        for k in ("x", "y", "task"):
            expected = torch.cat([task.everything[k] for task in stream[: t + 1]])
            assert torch.equal(everything[k], expected)
    assert [Joint(when="last").plan(stream, t) is None for t in range(3)] == [*(True, True, False)]
    with pytest.raises(UsageError, match=r"when=often: use every or last"):
        Joint(when="often")


@pytest.mark.parametrize("scenario", ["domain", "task", "class"])
@pytest.mark.parametrize("fresh", [True, False])
def test_joint_starts_from_fresh_weights(fresh, scenario):
    stream = make_stream(scenario)
    learner, joint = make_learner(stream), Joint(fresh)
    start = weights(learner)
    learn_stream(learner, joint, stream[:2])
    learned = weights(learner)
    learner.begin(stream[2], joint)
    for name, weight in weights(learner).items():
        assert torch.equal(weight, start[name] if fresh else learned[name])
    assert all(p.requires_grad for p in learner.parameters())


def test_joint_from_scratch_is_one_training_on_all_data():
    stream = make_stream()
    learner, single = make_learner(stream), make_learner(stream)
    learn_stream(learner, Joint(), stream)
    everything = {k: torch.cat([t.everything[k] for t in stream]) for k in ("x", "y", "task")}
    whole = ToyTask(2, 0, range(CLASSES), everything["x"], everything["y"])
    learn(single, Finetune(), whole)
    for name, weight in weights(single).items():
        torch.testing.assert_close(weights(learner)[name], weight)


def test_joint_at_the_last_task_alone_ends_the_same():
    stream = make_stream(tasks=2)
    found = []
    for when in ("every", "last"):
        learner = make_learner(stream)
        strategy = Joint(when=when)
        engine = make_engine(learner, strategy)
        Experiment(stream, strategy, engine, EvalSettings(), Silent(), Silent()).run()
        found.append(weights(learner))
    assert all(torch.equal(found[0][n], w) for n, w in found[1].items())


def test_finetune_is_the_plain_loop():
    stream = make_stream()
    learner, plain = make_learner(stream), make_learner(stream)
    learn_stream(learner, Finetune(), stream, epochs=1, batch_size=40)
    optimizer = SGD(plain.parameters(), lr=0.05)
    for task in stream:
        batch = task.everything
        optimizer.zero_grad()
        F.cross_entropy(plain.heads[0](plain.backbone(batch["x"])), batch["y"]).backward()
        optimizer.step()
    for name, weight in weights(plain).items():
        torch.testing.assert_close(weights(learner)[name], weight)
