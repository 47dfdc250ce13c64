"""LwF.MC: a question for every class."""

import math

import pytest
import torch
from toys import make_engine, make_learner, make_stream

from cl_bench.contracts import UsageError
from cl_bench.experiment import check_pair
from cl_bench.strategies.distillation.lwf_mc import LwFMC
from cl_bench.strategies.logits import sigmoid_distillation


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def test_targets_are_old_answers_and_new_labels():
    rng = torch.Generator().manual_seed(0)
    out = torch.randn(4, 5, generator=rng, dtype=torch.float64)
    said = torch.randn(4, 5, generator=rng, dtype=torch.float64)
    y = [3, 4, 3, 1]  # the last is an exemplar: of its class the old network speaks
    found = sigmoid_distillation(out, {"y": torch.tensor(y)}, lambda batch: said, 3)
    for i in range(4):
        wanted = 0.0
        for c in range(5):
            target = sigmoid(said[i, c]) if c < 3 else float(y[i] == c)
            assert 0 <= target <= 1
            p = sigmoid(out[i, c])
            wanted -= (target * math.log(p) + (1 - target) * math.log(1 - p)) / 5
        assert float(found[i]) == pytest.approx(wanted, rel=1e-12)


def test_without_old_classes_only_labels_count():
    out = torch.zeros(2, 4, dtype=torch.float64)
    found = sigmoid_distillation(out, {"y": torch.tensor([0, 3])}, None, 0)
    torch.testing.assert_close(found, torch.full((2,), math.log(2), dtype=torch.float64))


def test_an_equal_copy_pulls_old_classes_nowhere():
    stream = make_stream("class")
    learner, strategy = make_learner(stream), LwFMC()
    learner.begin(stream[1], strategy)
    learner.eval()
    batch = stream[1].everything
    strategy.objective(learner, batch, learner(batch)).mean.backward()
    assert float(learner.heads[0].weight.grad.abs().max()) < 1e-7
    assert float(learner.heads[1].weight.grad.abs().max()) > 1e-3


@pytest.mark.parametrize(("logits", "width"), [("seen", 6), ("all", 9)])
def test_classes_to_come_are_asked_for_if_wanted(logits, width):
    stream = make_stream("class")
    widths = []

    class Watched(LwFMC):
        def objective(self, learner, batch, out):
            widths.append(out.shape[1])
            return super().objective(learner, batch, out)

    strategy = Watched(logits=logits)
    learner = make_learner(stream)
    before = learner.heads[2].weight.clone()
    engine = make_engine(learner, strategy, epochs=1)
    for t in range(2):
        engine.learn(stream[t], strategy.plan(stream, t))
    assert widths[-1] == width
    assert torch.equal(before, learner.heads[2].weight) is (logits == "seen")


@pytest.mark.parametrize("scenario", ["domain", "task"])
def test_streams_without_new_classes_in_one_softmax_are_refused(scenario):
    with pytest.raises(UsageError, match=rf"scenario class.*is of scenario {scenario}"):
        check_pair("lwf_mc", LwFMC(), make_stream(scenario))
    check_pair("lwf_mc", LwFMC(), make_stream("class"))
