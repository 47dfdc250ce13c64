"""BiC: what the line learns, on what, and what it leaves alone."""

import math

import pytest
import torch
from toys import make_engine, make_learner, make_stream

from cl_bench.contracts import UsageError
from cl_bench.strategies.replay.bic import BiC, Line
from cl_bench.strategies.replay.wa import WA


class Watched(BiC):
    """Keeps losses, and the network's weights around the second stage."""

    def __init__(self, **options):
        super().__init__(**options)
        self.steps, self.around, self.second = [], [], []

    def lines(self, learner):
        found = [line for name, line in learner.extras(self).items() if name[-1] in "12"]
        return [(x.alpha.item(), x.beta.item()) for x in found[: len(self.tasks)]]

    def objective(self, learner, batch, out):
        found = super().objective(learner, batch, out)
        said = self.teacher(batch) if self.teacher else None
        row = (float(found.mean.detach()), batch["y"], out.detach(), said, self.lines(learner))
        self.steps.append(row)
        return found

    def of_the_line(self, learner, batch, out):
        self.second.append(batch["y"])
        return super().of_the_line(learner, batch, out)

    def phases(self, learner, task):
        self.around.append({k: v.clone() for k, v in learner.weights().items()})
        return super().phases(learner, task)


def learned(strategy, epochs=2, tasks=3):
    stream = make_stream("class", n=60)
    learner = make_learner(stream, pack=4)
    strategy.check(learner)
    engine = make_engine(learner, strategy, epochs, pack=4)
    for t in range(tasks):
        engine.learn(stream[t], strategy.plan(stream, t))
    return stream, learner, engine


def test_one_and_zero_change_nothing_to_the_bit():
    out = torch.randn(7, 3)
    assert torch.equal(Line()(out), out)
    strategy = BiC(memory=45)
    stream, learner, _ = learned(strategy)
    for line in learner.extras(strategy).values():
        torch.nn.init.ones_(line.alpha)
        torch.nn.init.zeros_(line.beta)
    learner.eval()
    batch = stream[0].everything
    with torch.no_grad():
        assert torch.equal(strategy.predict(learner, batch, None), learner(batch))


def test_the_correction_is_a_line_for_each_task_but_the_first():
    strategy = Watched(memory=45, epochs=5)
    stream, learner, _ = learned(strategy)
    learner.eval()
    batch = stream[1].everything
    with torch.no_grad():
        raw, answer = learner(batch), strategy.predict(learner, batch, None)
    assert torch.equal(answer[:, :3], raw[:, :3])
    lines = strategy.lines(learner)
    assert len(lines) == 2
    for t, (alpha, beta) in enumerate(lines, 1):
        assert (alpha, beta) != (1.0, 0.0)
        block = slice(3 * t, 3 * t + 3)
        torch.testing.assert_close(answer[:, block], alpha * raw[:, block] + beta)


def test_the_second_stage_learns_two_numbers_and_nothing_else():
    strategy = Watched(memory=45, epochs=3)
    learned(strategy)
    # asked at the end of each stage: once for the first task, twice for the others
    assert len(strategy.around) == 1 + 2 + 2
    for before, after, name in ((1, 2, "task1"), (3, 4, "task2")):
        one, other = strategy.around[before], strategy.around[after]
        moved = {k for k in one if not torch.equal(one[k], other[k])}
        assert moved == {f"extra.Watched.{name}.alpha", f"extra.Watched.{name}.beta"}


def test_the_second_stage_sees_as_many_of_every_class_and_none_of_the_first():
    strategy = BiC(memory=60, apart=0.25)
    stream, _, _ = learned(strategy, tasks=2)
    first, second = strategy.parted(stream[2], strategy.apart)
    y = second[torch.arange(len(second))]["y"]
    assert torch.equal(y.bincount(), torch.full((9,), 2))  # a quarter of 10, rounded
    rest = first[torch.arange(len(first))]
    assert torch.equal(rest["y"].bincount(), torch.tensor([8] * 6 + [18] * 3))
    rows = {tuple(x.tolist()) for x in rest["x"]}
    assert not rows & {tuple(x.tolist()) for x in second[torch.arange(len(second))]["x"]}


def test_losses_by_hand_with_old_classes_corrected_in_both_networks():
    strategy = Watched(memory=45, temperature=2.0, squared=True, epochs=4)
    learned(strategy, epochs=1)
    third = [step for step in strategy.steps if len(step[4]) == 2 and step[3] is not None]
    assert third
    for loss, y, out, said, ((alpha, beta), newest) in third:
        assert newest == (1.0, 0.0)
        total, share = 0.0, 6 / 9
        for z, label, old in zip(out.clone(), y.tolist(), said.clone(), strict=True):
            for v in (z, old):
                v[3:6] = alpha * v[3:6] + beta
            ce = float(z.logsumexp(0) - z[label])
            p, q = ((v[:6] / 2.0).log_softmax(0).tolist() for v in (old, z))
            kd = -sum(math.exp(a) * b for a, b in zip(p, q, strict=True))
            total += (1 - share) * ce + share * 4 * kd
        assert loss == pytest.approx(total / len(y), rel=1e-5)


def test_it_scores_at_least_as_well_as_what_it_corrects():
    class Uncorrected(WA):
        """The first stage alone, rows as they are."""

        def consolidate(self, learner, task, stats):
            self.old = 0
            super().consolidate(learner, task, stats)

    def score(strategy):
        stream, _, engine = learned(strategy, epochs=6)
        return sum(engine.evaluate(list(stream), 100, None).values()) / 3

    assert score(BiC(memory=90)) > score(Uncorrected(memory=90, squared=True)) - 0.05


def test_two_samples_of_a_class_are_the_least():
    with pytest.raises(UsageError, match=r"each needs 2 of the samples; at least 18"):
        BiC(memory=17).plan(make_stream("class"), 0)
