"""iCaRL: exemplars, and the nearest mean of them."""

import itertools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from toys import IMAGE, cnn, make_engine, make_learner, make_stream

from cl_bench.contracts import UsageError
from cl_bench.strategies.analytic.ncm import NCM
from cl_bench.strategies.distillation.lwf_mc import LwFMC
from cl_bench.strategies.replay.bic import BiC
from cl_bench.strategies.replay.buffer import herd
from cl_bench.strategies.replay.icarl import ICaRL
from cl_bench.tasks.augmented import Augmented, Flip


def learned(strategy, tasks=3, epochs=2, double=False):
    stream = make_stream("class", tasks=tasks)
    learner = make_learner(stream, pack=4)
    if double:
        learner.double()
        for task in stream:
            task.data.tensors["x"] = task.data.tensors["x"].double()
    strategy.check(learner)
    engine = make_engine(learner, strategy, epochs, pack=4)
    for t in range(tasks):
        engine.learn(stream[t], strategy.plan(stream, t))
    learner.eval()
    return stream, learner, engine


def test_with_all_samples_kept_it_is_the_class_mean_of_normalised_features():
    strategy = ICaRL(memory=10**4)
    stream, learner, _ = learned(strategy, double=True)
    x = torch.cat([task.everything["x"] for task in stream])
    y = torch.cat([task.everything["y"] for task in stream])
    with torch.no_grad():
        phi = F.normalize(learner.features({"x": x}), dim=1)
        means = torch.stack([F.normalize(phi[y == c].mean(0), dim=0) for c in range(9)])
        logits = strategy.predict(learner, {"x": x, "y": y}, None)
    torch.testing.assert_close(logits, phi @ means.t(), atol=1e-10, rtol=0)
    nearest = torch.cdist(phi, means).argmin(1)
    assert torch.equal(logits.argmax(1), nearest)
    assert strategy.exemplars == len(y)

    class Normalised(NCM):
        """On features of length 1."""

        def collect(self, learner, task):
            plain = learner.features
            learner.features = lambda batch: F.normalize(plain(batch), dim=1)
            try:
                return super().collect(learner, task)
            finally:
                del learner.features

    ncm = Normalised()
    for task in stream:
        ncm.consolidate(learner, task, ncm.collect(learner, task))
    with torch.no_grad():
        torch.testing.assert_close(
            ncm.predict(learner, {"x": x, "y": y}, None), logits, atol=1e-10, rtol=0
        )


def test_exemplars_are_herded_and_old_ones_a_prefix():
    kept = []

    class Watched(ICaRL):
        def consolidate(self, learner, task, stats):
            super().consolidate(learner, task, stats)
            kept.append({c: v["x"].clone() for c, v in self.kept.classes.items()})
            with torch.no_grad(), learner.evaluating():
                f = F.normalize(learner.features(task.everything).double(), dim=1)
            for c in task.classes:
                rows = (task.everything["y"] == c).nonzero().flatten()
                wanted = task.everything["x"][rows[herd(f[rows], 18 // task.classes.stop)]]
                assert torch.equal(self.kept.classes[c]["x"], wanted)

    strategy = Watched(memory=18)
    learned(strategy)
    assert [sorted(k) for k in kept] == [list(range(n)) for n in (3, 6, 9)]
    assert [len(k[0]) for k in kept] == [6, 3, 2]
    for before, after in itertools.pairwise(kept):
        for c, x in before.items():
            assert torch.equal(after[c], x[: len(after[c])])


def test_exemplars_are_learned_beside_the_task():
    strategy = ICaRL(memory=18)
    stream, _, _ = learned(strategy, tasks=2)
    three = make_stream("class", tasks=3)
    data = strategy.plan(three, 2).data
    y = data[torch.arange(len(data))]["y"]
    assert y[:40].min() >= 6
    assert torch.equal(y[40:].bincount(), torch.full((6,), 3))
    first = strategy.plan(stream, 0).data[torch.arange(3)]
    assert torch.equal(first["x"], stream[0].everything["x"][:3])


@pytest.mark.parametrize("kind", [ICaRL, BiC])
def test_exemplars_are_augmented_as_the_task_is(kind):
    stream = make_stream("class", tasks=2, shape=IMAGE)
    for task in stream:
        task.data = Augmented(task.data, Flip())
    strategy, learner = kind(memory=30), make_learner(stream, cnn())
    engine = make_engine(learner, strategy, 1)
    for t in range(2):
        data = strategy.plan(stream, t).data
        view = data.augmented(0)[torch.arange(len(data))]
        plain = data[torch.arange(len(data))]["x"]
        flipped = (view["x"] != plain).flatten(1).any(1)
        assert flipped[40:].any() or t == 0
        assert not flipped[40:].all() or t == 0
        assert torch.equal(view["plain"], plain)
        engine.learn(stream[t], strategy.plan(stream, t))


def test_it_forgets_less_than_its_loss_alone():
    def score(strategy):
        stream, _, engine = learned(strategy, epochs=6)
        return sum(engine.evaluate(list(stream), 100, None).values()) / 3

    assert score(ICaRL(memory=45)) > score(LwFMC()) + 0.2


def test_a_memory_without_room_for_every_class_is_refused():
    with pytest.raises(UsageError, match=r"strategy\.memory=8: .*9 classes.*at least 9"):
        ICaRL(memory=8).plan(make_stream("class"), 0)
