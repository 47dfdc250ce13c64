"""ER-ACE: new samples among their own classes, old ones among all."""

import pytest
import torch
from toys import make_engine, make_learner, make_stream

from cl_bench.strategies.logits import present
from cl_bench.strategies.replay.er_ace import ERACE
from cl_bench.strategies.replay.rehearsal import DRAW


class Watched(ERACE):
    """Keeps batches, answers and losses."""

    def __init__(self, **options):
        super().__init__(**options)
        self.steps = []

    def objective(self, learner, batch, out):
        found = super().objective(learner, batch, out)
        self.steps.append((batch, out.detach(), float(found.mean.detach()), self.classes))
        return found


def learned(strategy, scenario="class", epochs=2, batch_size=4):
    stream = make_stream(scenario, tasks=3)
    learner = make_learner(stream, batch_size=batch_size, pack=8)
    engine = make_engine(learner, strategy, epochs, 8, batch_size)
    for t in range(3):
        engine.learn(stream[t], strategy.plan(stream, t))
    return stream, learner, engine


@pytest.mark.parametrize("scenario", ["domain", "task", "class"])
@pytest.mark.parametrize("logits", ["seen", "all"])
def test_the_loss_is_that_of_the_paper(scenario, logits):
    strategy = Watched(memory=25, replay=3, logits=logits)
    learned(strategy, scenario)
    fewer = 0
    for batch, out, loss, classes in strategy.steps:
        new = batch[DRAW] == 0
        own = set(batch["y"][new].tolist())
        fewer += len(own) < 3
        to_come = range(classes.stop, out.shape[1])  # none, unless they take part
        terms = {True: [], False: []}
        for z, y, is_new in zip(out, batch["y"].tolist(), new.tolist(), strict=True):
            among = [*own, *to_come] if is_new else list(range(out.shape[1]))
            terms[is_new].append(z[among].logsumexp(0) - z[y])
        wanted = sum(torch.stack(t).mean() for t in terms.values() if t)
        assert loss == pytest.approx(float(wanted), rel=1e-5, abs=1e-6)
        assert len(terms[False]) in (0, 3)
    assert fewer  # batches that lack a class of their task were among them


def test_new_samples_do_not_push_down_what_they_are_not_of():
    out = torch.randn(3, 6, requires_grad=True)
    y = torch.tensor([4, 5, 4])
    masked = present(out, y.unique(), 6)
    torch.nn.functional.cross_entropy(masked, y).backward()
    assert not out.grad[:, :4].any()
    assert out.grad[:, 4:].all()
    assert (present(out, y.unique(), 5)[:, 5] == out[:, 5]).all()


def test_samples_are_kept_as_er_keeps_them():
    strategy = ERACE(memory=30)
    learned(strategy)
    assert strategy.exemplars == 30
    assert strategy.seen == 3 * 2 * 40
    assert set(strategy.buffer) == {"x", "y", "task"}
