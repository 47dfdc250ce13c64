"""GDumb: a balanced memory, learned from scratch."""

import pytest
import torch
from toys import make_engine, make_learner, make_stream

from cl_bench.strategies.replay.gdumb import GDumb


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_what_was_learned_before_leaves_nothing_but_its_samples(scenario):
    """The second task's network is one that has met the memory alone."""
    stream = make_stream(scenario, tasks=2)
    strategy = GDumb(memory=18)
    learner = make_learner(stream, pack=4)
    strategy.check(learner)
    engine = make_engine(learner, strategy, epochs=3, pack=4)
    engine.learn(stream[0], strategy.plan(stream, 0))
    plan = strategy.plan(stream, 1)
    engine.learn(stream[1], plan)

    other = make_learner(stream, pack=4)
    fresh = GDumb(memory=18)
    other.seen_heads = 2
    make_engine(other, fresh, epochs=3, pack=4).learn(stream[1], plan)
    assert all(torch.equal(v, other.weights()[k]) for k, v in learner.weights().items())


def test_every_class_has_as_many_samples_and_they_are_those_that_are_kept():
    stream = make_stream("class")
    strategy = GDumb(memory=20)
    learner = make_learner(stream)
    engine = make_engine(learner, strategy, epochs=1)
    for t, quota in enumerate((6, 3, 2)):
        data = strategy.plan(stream, t).data
        learned = data[torch.arange(len(data))]
        assert torch.equal(learned["y"].bincount(), torch.full((3 * (t + 1),), quota))
        engine.learn(stream[t], strategy.plan(stream, t))
        kept = strategy.kept.batch()
        assert all(torch.equal(v, learned[k]) for k, v in kept.items())
        assert strategy.exemplars == len(data)


def test_the_choice_is_the_seeds():
    stream = make_stream("class")
    drawn = []
    for seed in (0, 0, 1):
        strategy = GDumb(memory=20)
        strategy.check(make_learner(stream, seed=seed))
        drawn.append(strategy.plan(stream, 0).data[torch.arange(18)]["x"])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
