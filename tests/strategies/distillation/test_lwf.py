"""Learning without forgetting: the loss, the copy, and what is left when nothing is distilled."""

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from toys import make_engine, make_learner, make_stream

from cl_bench.contracts import UsageError
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.distillation.lwf import LwF
from cl_bench.strategies.logits import distillation, only
from cl_bench.tasks.tensors import from_tensors


def learned(strategy, scenario, tasks=3, epochs=2):
    stream = make_stream(scenario, tasks=tasks)
    learner = make_learner(stream, pack=4)
    engine = make_engine(learner, strategy, epochs=epochs, pack=4)
    for t in range(tasks):
        engine.learn(stream[t], strategy.plan(stream, t))
    return stream, learner, engine


def softmax(logits, temperature):
    weights = [math.exp(z / temperature) for z in logits]
    return [w / sum(weights) for w in weights]


def by_hand(new, old, temperature):
    return -sum(
        p * math.log(q)
        for p, q in zip(softmax(old, temperature), softmax(new, temperature), strict=True)
    )


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("squared", [False, True])
def test_the_term_is_that_of_the_paper(temperature, squared):
    new, old = [0.3, -1.0, 2.0], [1.0, 0.5, -0.25]
    pair = (torch.tensor([z], dtype=torch.float64) for z in (new, old))
    wanted = by_hand(new, old, temperature) * (temperature**2 if squared else 1)
    assert float(distillation(*pair, temperature, squared)) == pytest.approx(wanted, rel=1e-12)


def test_equal_answers_pull_nowhere_and_great_heat_is_the_square_of_centred_logits():
    rng = torch.Generator().manual_seed(0)
    old = torch.randn(4, 5, generator=rng, dtype=torch.float64)
    new = old.clone().requires_grad_()
    distillation(new, old, 2.0, True).sum().backward()
    assert float(new.grad.abs().max()) < 1e-12
    other = torch.randn(4, 5, generator=rng, dtype=torch.float64, requires_grad=True)
    distillation(other, old, 1e4, True).sum().backward()
    centred = [z - z.mean(1, keepdim=True) for z in (other.detach(), old)]
    torch.testing.assert_close(other.grad, (centred[0] - centred[1]) / 5, atol=1e-3, rtol=1e-3)


def test_other_classes_are_left_out_of_the_softmax():
    rng = torch.Generator().manual_seed(0)
    out = torch.randn(6, 7, generator=rng, requires_grad=True)
    y = torch.tensor([2, 3, 4, 2, 3, 4])
    loss = F.cross_entropy(only(out, range(2, 5)), y)
    torch.testing.assert_close(loss, F.cross_entropy(out[:, 2:5], y - 2))
    loss.backward()
    assert not out.grad[:, [0, 1, 5, 6]].any()
    assert out.grad[:, 2:5].all()


class Watched(LwF):
    """Keeps what the loss is made of."""

    def __init__(self, **options):
        super().__init__(**options)
        self.steps, self.copies = [], []

    def setup(self, learner, task):
        super().setup(learner, task)
        if self.teacher is not None:
            state = {k: v.clone() for k, v in learner.weights().items()}
            self.copies.append((self.teacher, state))

    def objective(self, learner, batch, out):
        found = super().objective(learner, batch, out)
        f = learner.features(batch)
        self.steps.append(
            {
                "loss": float(found.mean.detach()),
                "y": batch["y"],
                "new": learner.readout(f).detach(),
                "old": self.teacher.readout(self.teacher.features(batch)) if self.teacher else None,
                "classes": self.classes,
            }
        )
        return found


@pytest.mark.parametrize(
    ("scenario", "groups"),
    [
        ("domain", [range(3)]),
        ("task", [range(3), range(3, 6)]),
        ("class", [range(6)]),
    ],
)
@pytest.mark.parametrize("logits", ["current", "seen"])
def test_losses_of_the_third_task_by_hand(scenario, groups, logits):
    strategy = Watched(strength=0.7, temperature=2.0, logits=logits)
    stream, _, _ = learned(strategy, scenario)
    third = [s for s in strategy.steps if s["classes"] == stream[2].classes][-4:]
    assert third[0]["old"] is not None
    for step in third:
        total = 0.0
        classes = step["classes"]
        among = range(9) if (scenario, logits) == ("class", "seen") else classes
        for i, label in enumerate(step["y"].tolist()):
            new, old = step["new"][i].tolist(), step["old"][i].tolist()
            p = softmax([new[c] for c in among], 1.0)
            total -= math.log(p[label - among.start])
            for group in groups:
                pair = [[z[c] for c in group] for z in (new, old)]
                total += 0.7 * by_hand(*pair, 2.0)
        assert step["loss"] == pytest.approx(total / len(step["y"]), rel=1e-5)


@pytest.mark.parametrize("scenario", ["domain", "task", "class"])
def test_without_strength_it_is_fine_tuning_to_the_bit(scenario):
    _, one, _ = learned(LwF(strength=0, logits="seen"), scenario)
    _, other, _ = learned(Finetune(), scenario)
    assert all(torch.equal(v, other.weights()[k]) for k, v in one.weights().items())
    _, moved, _ = learned(LwF(logits="seen"), scenario)
    assert not all(torch.equal(v, other.weights()[k]) for k, v in moved.weights().items())


def test_a_class_that_competes_with_none_is_refused():
    x, y = torch.randn(8, 12), torch.zeros(8, dtype=torch.long)
    learner = make_learner(from_tensors([(x, y)] * 2, "class", labels="task"))
    with pytest.raises(UsageError, match=r"logits=current: .* has one class"):
        LwF().check(learner)
    LwF(logits="all").check(learner)


def test_the_copy_is_the_network_before_the_task_and_never_changes():
    strategy = Watched()
    stream, learner, _ = learned(strategy, "class")
    assert len(strategy.copies) == 2
    assert strategy.teacher is None  # released
    for t, (copy, state) in enumerate(strategy.copies, 1):
        said = copy.features(stream[0].everything)
        now = {k: v.clone() for k, v in learner.weights().items()}
        learner.load_weights(state)
        learner.eval()
        with torch.no_grad():
            assert torch.equal(said, learner.features(stream[0].everything))
        learner.load_weights(now)
        assert copy.readout(said).shape[1] == 3 * (t + 1)


def test_old_classes_are_told_apart_better_than_after_fine_tuning():
    def told(strategy):
        stream, learner, _ = learned(strategy, "task", epochs=10)
        learner.eval()
        with torch.no_grad():
            out = [learner(task.everything) for task in stream]
        pairs = zip(out, stream, strict=True)
        return sum(float((z.argmax(1) == t.everything["y"]).float().mean()) for z, t in pairs)

    assert told(LwF(strength=3.0)) >= told(Finetune())
