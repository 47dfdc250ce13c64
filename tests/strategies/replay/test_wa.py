"""Weight aligning: rows of one length, and the loss before it."""

import math

import pytest
import torch
from toys import make_engine, make_learner, make_stream

from cl_bench.strategies.replay.wa import WA


class Watched(WA):
    """Keeps the output layer before and after it is aligned, and losses."""

    def __init__(self, **options):
        super().__init__(**options)
        self.layers, self.steps = [], []

    def objective(self, learner, batch, out):
        found = super().objective(learner, batch, out)
        said = self.teacher(batch) if self.teacher else None
        self.steps.append((float(found.mean.detach()), batch["y"], out.detach(), said, self.old))
        return found

    def consolidate(self, learner, task, stats):
        before = [head.weight.detach().clone() for head in learner.heads]
        super().consolidate(learner, task, stats)
        after = [head.weight.detach().clone() for head in learner.heads]
        super().consolidate(learner, task, stats)
        twice = [head.weight.detach().clone() for head in learner.heads]
        self.layers.append((before, after, twice))


def learned(strategy, epochs=2):
    stream = make_stream("class")
    learner = make_learner(stream, pack=4)
    engine = make_engine(learner, strategy, epochs, pack=4)
    for t in range(3):
        engine.learn(stream[t], strategy.plan(stream, t))
    return stream, learner, engine


def test_rows_of_new_classes_become_as_long_as_old_ones_and_old_rows_stay():
    strategy = Watched(memory=45)
    learned(strategy)
    for t, (before, after, twice) in enumerate(strategy.layers):
        for i in range(3):
            assert torch.equal(before[i], after[i]) or i == t > 0
            torch.testing.assert_close(after[i], twice[i])  # a second time changes nothing
        if t:
            lengths = [torch.cat(a).norm(dim=1).mean() for a in (after[:t], [after[t]])]
            torch.testing.assert_close(lengths[0], lengths[1])
            ratio = after[t] / before[t]
            torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))
            assert abs(float(ratio.mean()) - 1) > 1e-3


@pytest.mark.parametrize("squared", [False, True])
def test_the_loss_is_weighed_by_the_share_of_old_classes(squared):
    strategy = Watched(memory=45, temperature=3.0, squared=squared)
    learned(strategy, epochs=1)
    assert {old for *_, old in strategy.steps} == {0, 3, 6}
    for loss, y, out, said, old in strategy.steps:
        share, total = old / (old + 3), 0.0
        for z, label, before in zip(out, y.tolist(), out if said is None else said, strict=True):
            ce = float(z.logsumexp(0) - z[label])
            new, wanted = (v[:old] / 3.0 for v in (z, before))
            p = [math.exp(float(v - wanted.logsumexp(0))) for v in wanted] if old else []
            kd = -sum(q * float(v - new.logsumexp(0)) for q, v in zip(p, new, strict=True))
            total += (1 - share) * ce + share * kd * (9 if squared else 1)
        assert loss == pytest.approx(total / len(y), rel=1e-5)
