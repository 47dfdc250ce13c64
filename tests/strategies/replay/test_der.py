"""Dark experience: the terms of the loss, and what is kept."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from toys import make_engine, make_learner, make_stream

from cl_bench.contracts import UsageError
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.replay.der import DER, apart_from
from cl_bench.strategies.replay.derpp import DERpp
from cl_bench.strategies.replay.rehearsal import DRAW
from cl_bench.tasks.tensors import from_tensors


def learned(strategy, scenario, tasks=3, pack=4, **options):
    stream = make_stream(scenario, tasks=tasks)
    learner = make_learner(stream, pack=pack)
    engine = make_engine(learner, strategy, pack=pack, **options)
    for t in range(tasks):
        engine.learn(stream[t], strategy.plan(stream, t))
    return stream, learner, engine


class Watched(DERpp):
    """Keeps batches, answers and losses."""

    def __init__(self, **options):
        super().__init__(**options)
        self.steps = []

    def objective(self, learner, batch, out):
        found = super().objective(learner, batch, out)
        self.steps.append((batch, out.detach(), float(found.mean.detach()), self.classes))
        return found


def by_hand(batch, out, classes, logits, alpha, beta):
    """Eq. 6, sample by sample."""
    terms = {0: [], 1: [], 2: []}
    for i, k in enumerate(batch[DRAW].tolist()):
        z, y = out[i], batch["y"][i]
        if k == 1:
            own = [c for c in range(int(batch["known"][i])) if z[c] > -torch.inf]
            terms[1].append(sum((z[c] - batch["logits"][i, c]) ** 2 for c in own) / len(own))
        elif k == 0 and logits == "current":
            inside = z[classes.start : classes.stop]
            terms[0].append(inside.logsumexp(0) - z[y])
        else:
            terms[k].append(z.logsumexp(0) - z[y])
    return sum(w * torch.stack(terms[k]).mean() for k, w in enumerate((1, alpha, beta)) if terms[k])


@pytest.mark.parametrize("scenario", ["domain", "task", "class"])
@pytest.mark.parametrize("logits", ["current", "seen", "all"])
def test_the_loss_is_that_of_the_paper(scenario, logits):
    strategy = Watched(alpha=0.7, beta=0.4, memory=25, logits=logits)
    learned(strategy, scenario)
    kinds = set()
    for batch, out, loss, classes in strategy.steps:
        kinds.add(int(batch[DRAW].max()))
        wanted = by_hand(batch, out, classes, logits, 0.7, 0.4)
        assert loss == pytest.approx(float(wanted), rel=1e-5)
    assert kinds == {0, 2}
    widths = {out.shape[1] for _, out, _, _ in strategy.steps}
    growing = {3, 6, 9} if logits != "all" and scenario != "domain" else {9}
    assert widths == ({3} if scenario == "domain" else growing)


@pytest.mark.parametrize("scenario", ["domain", "task", "class"])
@pytest.mark.parametrize(
    "strategy", [DER(alpha=0, logits="seen"), DERpp(alpha=0, beta=0, logits="seen")]
)
def test_without_weights_it_is_fine_tuning_to_the_bit(scenario, strategy):
    _, one, _ = learned(strategy, scenario)
    _, other, _ = learned(Finetune(), scenario)
    assert all(torch.equal(v, other.weights()[k]) for k, v in one.weights().items())
    assert strategy.exemplars == 0


def test_answers_are_those_before_the_step():
    """Every sample that is kept stands with what the network said of it when it came by."""
    strategy = Watched(alpha=0.5, beta=0.5, memory=10**4, logits="seen")
    learned(strategy, "class", tasks=2, epochs=1)
    said = []
    for batch, out, _, _ in strategy.steps:
        new = batch[DRAW] == 0
        said += [(x, z) for x, z in zip(batch["x"][new], out[new], strict=True)]
    assert strategy.exemplars == len(said) == 80
    for i, (x, z) in enumerate(said):
        assert torch.equal(strategy.buffer["x"][i], x)
        known = int(strategy.buffer["known"][i])
        assert torch.equal(strategy.buffer["logits"][i, :known], z)
        assert not strategy.buffer["logits"][i, known:].any()
    assert set(strategy.buffer["known"][:80].tolist()) == {3, 6}


@pytest.mark.parametrize("scenario", ["domain", "task", "class"])
@pytest.mark.parametrize("logits", ["seen", "all"])
@pytest.mark.parametrize("part", [slice(0, 6), slice(6, None)])
def test_a_process_that_has_a_part_of_the_batch_keeps_the_answers_to_all_of_it(
    scenario, logits, part
):
    stream = make_stream(scenario)
    strategy = DER(logits=logits, memory=30)
    learner = make_learner(stream)
    engine = make_engine(learner, strategy)
    engine.learn(stream[0], strategy.plan(stream, 0))
    learner.begin(stream[1], strategy)
    learner.train()
    new = stream[1].train[torch.arange(8)]
    batch = strategy.on_batch(learner, {**new, "plain": new["x"]})
    strategy.penalty(learner, batch, learner(batch))
    whole = {k: strategy.learned[-1][k].clone() for k in ("logits", "known")}
    mine = {k: v[part] for k, v in batch.items()}
    strategy.penalty(learner, mine, learner(mine))
    for k, v in whole.items():
        torch.testing.assert_close(strategy.learned[-1][k], v)
    assert set(whole["known"].tolist()) == {learner(batch).shape[1]}


def test_a_class_that_competes_with_none_is_refused():
    """The cross-entropy of one class is 0."""
    x, y = torch.randn(8, 12), torch.zeros(8, dtype=torch.long)
    stream = from_tensors([(x, y)] * 2, "class", labels="task")
    learner = make_learner(stream)
    with pytest.raises(UsageError, match=r"logits=current: .* has one class.*use .*=seen"):
        DER(logits="current").check(learner)
    DER(logits="seen").check(learner)
    DER(logits="current").check(make_learner(make_stream("class")))


def test_answers_that_have_not_changed_cost_nothing():
    rng = torch.Generator().manual_seed(0)
    out = torch.randn(5, 6, generator=rng)
    assert not apart_from(out, out.clone(), torch.full((5,), 6)).any()
    assert not apart_from(out, out[:, :4] * (torch.arange(4) < 2), torch.full((5,), 2)).any()
    whole = apart_from(out, torch.zeros(5, 6), torch.full((5,), 6))
    torch.testing.assert_close(whole.mean(), F.mse_loss(out, torch.zeros(5, 6)))
    foreign = out.masked_fill(torch.arange(6) > 3, -torch.inf)
    torch.testing.assert_close(
        apart_from(foreign, torch.zeros(5, 6), torch.full((5,), 6)),
        out[:, :4].square().mean(1),
    )


def test_old_tasks_are_kept_better_than_without():
    scores = {}
    for name, strategy in {
        "der": DER(alpha=1.0, memory=60),
        "derpp": DERpp(alpha=0.5, beta=1.0, memory=60),
        "finetune": Finetune(),
    }.items():
        stream, _, engine = learned(strategy, "class", epochs=8)
        scores[name] = sum(engine.evaluate(list(stream), 100, None).values()) / 3
    assert scores["derpp"] > scores["finetune"] + 0.2
    assert scores["der"] > scores["finetune"] + 0.1


def test_the_softmax_of_all_classes_pushes_those_to_come_down():
    stream = make_stream("class")
    for logits, moved in (("all", True), ("seen", False)):
        learner = make_learner(stream)
        before = learner.heads[2].weight.clone()
        strategy = DER(logits=logits)
        make_engine(learner, strategy).learn(stream[0], strategy.plan(stream, 0))
        assert torch.equal(before, learner.heads[2].weight) is not moved
        learner.eval()
        assert learner(stream[0].everything).shape[1] == 3  # answers at test are of what was seen
