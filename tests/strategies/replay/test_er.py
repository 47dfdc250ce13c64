"""ER: the reservoir, what is replayed, and that it helps."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from states import assert_goes_on_the_same
from toys import Silent, learn, learn_stream, make_learner, make_stream

from cl_bench.contracts import UsageError
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.replay.er import ER


def numbered(start, count):
    """Samples that say who they are."""
    y = torch.arange(start, start + count)
    return {"x": y[:, None].float() * torch.ones(2), "y": y, "task": torch.zeros_like(y)}


def offered(er, seed, total, batch):
    learner = Silent()
    learner.seed = seed
    er.setup(learner, None)
    for start in range(0, total, batch):
        replayed(er, learner, numbered(start, min(batch, total - start)))
    return er


def replayed(er, learner, batch):
    """What a step learns."""
    learned = er.on_batch(learner, batch)
    er.after_step(learner, learned, torch.empty(0))
    return learned


@settings(max_examples=30)
@given(st.integers(1, 20), st.integers(1, 60), st.integers(1, 13), st.integers(0, 1000))
def test_reservoir_holds_distinct_whole_samples(memory, total, batch, seed):
    er = offered(ER(memory), seed, total, batch)
    kept = min(memory, total)
    assert (er.filled, er.seen) == (kept, total)
    y = er.buffer["y"][:kept]
    assert len(y.unique()) == kept
    assert int(y.max()) < total
    assert torch.equal(er.buffer["x"][:kept, 0].long(), y)
    if total <= memory:
        assert torch.equal(y, torch.arange(total))
    again = offered(ER(memory), seed, total, batch)
    assert torch.equal(again.buffer["y"], er.buffer["y"])


def test_reservoir_is_uniform_and_depends_on_the_seed():
    memory, total, runs = 10, 40, 600
    counts, buffers = torch.zeros(total), set()
    for seed in range(runs):
        er = offered(ER(memory), seed, total, 7)
        counts[er.buffer["y"]] += 1
        buffers.add(tuple(er.buffer["y"].tolist()))
    p = memory / total
    z = (counts - runs * p) / (runs * p * (1 - p)) ** 0.5
    assert len(buffers) == runs
    # 1 - p_value of chi^2 with 39 degrees of freedom: below 75 with probability .9995
    assert float(z.square().sum()) * (1 - p) < 75
    assert float(z.abs().max()) < 4.5


@pytest.mark.parametrize("replay", [None, 1, 6, 25])
def test_batches_are_learned_with_a_uniform_draw_from_the_memory(replay):
    learner = Silent()
    learner.seed = 3
    er = ER(8, replay)
    er.setup(learner, None)
    first = numbered(0, 5)
    assert replayed(er, learner, first) is first  # nothing to replay yet
    drawn = torch.zeros(40)
    for i in range(1, 8):
        held = set(er.buffer["y"][: er.filled].tolist())
        batch = numbered(5 * i, 5)
        learned = replayed(er, learner, batch)
        for key, values in batch.items():
            assert torch.equal(learned[key][:5], values)
            assert len(learned[key]) == 5 + (replay or 5)
            assert learned[key].dtype == values.dtype
        old = learned["y"][5:]
        assert set(old.tolist()) <= held
        assert torch.equal(learned["x"][5:, 0].long(), old)
        drawn += old.bincount(minlength=40)
    assert drawn.sum() == 7 * (replay or 5)


def test_a_longer_draw_covers_the_whole_memory_evenly():
    er = offered(ER(8, replay=8000), 0, 8, 8)
    learner = Silent()
    counts = er.on_batch(learner, numbered(8, 1))["y"][1:].bincount(minlength=8)
    assert len(counts) == 8
    assert float((counts - 1000).abs().max()) < 4.5 * 1000**0.5


@pytest.mark.parametrize("total", [24, 200])
def test_what_a_step_accumulates_draws_from_one_memory(total):
    learner = Silent()
    learner.seed = 3
    small, large = ER(16), ER(16)
    for er in (small, large):
        er.setup(learner, None)
    for start in range(0, total, 8):
        whole = replayed(large, learner, numbered(start, 8))["y"]
        parts = [small.on_batch(learner, numbered(start + i, 2))["y"] for i in (0, 2, 4, 6)]
        assert torch.equal(torch.cat([part[2:] for part in parts]), whole[8:])
        small.after_step(learner, {}, torch.empty(0))
        assert torch.equal(small.buffer["y"], large.buffer["y"])


def test_old_samples_train_their_own_heads():
    stream = make_stream("task", tasks=2)
    learner, er = make_learner(stream), ER(20)
    learn(learner, er, stream[0])
    before = learner.heads[0].weight.detach().clone()
    learn(learner, er, stream[1])
    assert not torch.equal(learner.heads[0].weight, before)
    assert set(er.buffer["task"].tolist()) == {0, 1}


def test_er_forgets_less_than_finetuning():
    losses = []
    for strategy in (Finetune(), ER(60)):
        stream = make_stream(tasks=3, subspace=None)
        learner = make_learner(stream)
        learn_stream(learner, strategy, stream, epochs=10)
        old = stream[0].everything
        losses.append(float(learner.loss(learner(old), old).detach()))
    assert losses[1] < 0.5 * losses[0]


def test_er_state_round_trip():
    one, other = assert_goes_on_the_same(lambda: ER(15))
    assert all(torch.equal(v, other.buffer[k]) for k, v in one.buffer.items())
    assert (one.seen, one.filled) == (other.seen, other.filled)


def test_er_state_is_a_snapshot():
    er = offered(ER(10), 0, 10, 5)
    state = er.state_dict()
    kept = copy.deepcopy(state)
    learner = Silent()
    ahead = replayed(er, learner, numbered(10, 200))
    assert all(torch.equal(v, state["buffer"][k]) for k, v in kept["buffer"].items())
    for _ in range(2):  # going on from it leaves it as it is
        again = ER(10)
        again.load_state_dict(state)
        assert torch.equal(replayed(again, learner, numbered(10, 200))["y"], ahead["y"])
        assert torch.equal(again.buffer["y"], er.buffer["y"])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"memory": 0}, r"memory=0: at least 1"), ({"replay": 0}, r"replay=0: at least 1, or null")],
)
def test_er_options(options, message):
    with pytest.raises(UsageError, match=message):
        ER(**options)
