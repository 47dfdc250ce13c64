"""Learners that observe: what they remember is what the batch solution is."""

import functools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.optim import SGD
from toys import Silent, make_stream

from cl_bench.experiment import LoopSettings
from cl_bench.learners import Classifier
from cl_bench.models import Identity
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.streaming.figmn import FIGMN
from cl_bench.strategies.streaming.lite_rvfl import LiteRVFL
from cl_bench.strategies.streaming.random_feature_owm import RandomFeatureOWM
from cl_bench.streaming import Streaming, StreamingEngine


def run(strategy, stream, batch=5, warmup=20, model=None, after=lambda task: None):
    learner = Classifier(stream, model or Identity(), functools.partial(SGD, lr=0.1), batch, 0)
    engine = StreamingEngine(
        learner, strategy, None, LoopSettings(0, batch), None, Silent(), Silent(),
        streaming=Streaming(warmup=warmup, window=20),
    )  # fmt: skip
    for t, task in enumerate(stream):
        engine.learn(task, strategy.plan(stream, t))
        after(task)
    return engine


def seen(engine, stream):
    """All samples in the order in which they came."""
    parts = [task.train[engine._order(task, len(task.train))] for task in stream]
    return torch.cat([p["x"] for p in parts]).double(), torch.cat([p["y"] for p in parts])


def scaled(x, warmup=20):
    return (x - x[:warmup].mean(0)) / (x[:warmup].std(0) + 0.01)


@pytest.mark.parametrize("batch", [1, 5])
def test_lite_rvfl_is_the_weighted_ridge_of_all_it_saw(batch):
    stream = make_stream(tasks=2, n=60)
    strategy = LiteRVFL(groups=2, nodes=4, regularisation="decaying")
    engine = run(strategy, stream, batch)
    x, y = seen(engine, stream)
    z, targets = strategy._features(scaled(x)), F.one_hot(y, 3).double()
    w = (1.003**-2) ** torch.arange(len(z) - 1, -1, -1).double()
    gram = z.t() @ (w[:, None] * z) + 0.1 * 1.003 ** (-2 * len(z)) * torch.eye(z.shape[1])
    wanted = torch.linalg.solve(gram, z.t() @ (w[:, None] * targets))
    torch.testing.assert_close(strategy.readout.beta, wanted, rtol=0, atol=1e-8)


def test_classes_that_come_later_are_learned_in_class_incremental_streams():
    stream = make_stream("class", tasks=3, n=60)
    for made in (LiteRVFL, FIGMN, functools.partial(RandomFeatureOWM, readout="ridge")):
        strategy = made()
        engine = run(strategy, stream)
        scores = engine.evaluate(list(stream), 50, None)
        assert strategy.classes == 9
        assert min(scores.values()) > 0.6, (made, scores)


def test_owm_keeps_old_answers_and_its_absence_does_not():
    """alpha to 0: outputs for inputs of old tasks stay; with a large alpha they move."""
    moved = {}
    for alpha in (1e-8, 1e3):
        stream = make_stream(tasks=2, n=30, subspace=2)
        strategy, outputs = RandomFeatureOWM(nodes=400, alpha=alpha), []
        old = scaled(seen(run(Finetune(), stream), stream)[0])[:30]

        def look(task, strategy=strategy, outputs=outputs, old=old):
            outputs.append(strategy.answers(old))

        run(strategy, stream, after=look)
        moved[alpha] = float((outputs[1] - outputs[0]).abs().max())
    assert moved[1e-8] < 1e-6 < 1e-2 < moved[1e3]


def test_ridge_readout_is_ridge_regression():
    stream = make_stream(tasks=2, n=60)
    strategy = RandomFeatureOWM(nodes=30, readout="ridge")
    x, y = seen(run(strategy, stream), stream)
    z, targets = strategy._features(scaled(x)), F.one_hot(y, 3).double()
    gram = z.t() @ z + 0.01 * torch.eye(30).double()
    wanted = torch.linalg.solve(gram, z.t() @ targets)
    torch.testing.assert_close(strategy.solver.beta, wanted, rtol=0, atol=1e-8)


def test_figmn_makes_components_of_what_is_far_and_no_more_than_it_may():
    stream = make_stream(tasks=2, n=60)
    few = FIGMN(components=4)
    run(few, stream)
    assert 1 < len(few.mixture) <= 4
    one = FIGMN(tau=1e-12, delta=50.0)
    run(one, stream)
    assert len(one.mixture) == 1
