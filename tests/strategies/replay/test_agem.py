"""A-GEM: no step against the gradient of old samples."""

import functools

import torch
from torch.optim import SGD
from toys import learn, make_learner, make_stream, weights

from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.replay.agem import AGEM


class Watched(AGEM):
    """Keeps what a step's gradients were before and after."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seen = []

    def constrain(self, learner):
        named = learner.named_trainable()
        before = {n: p.grad.clone() for n, p in named.items() if p.grad is not None}
        r = learner.gradients(self.kept.batch, mode="train") if len(self.kept) else None
        super().constrain(learner)
        self.seen.append((before, r, {n: named[n].grad.clone() for n in before}))


def flat(gradients, names):
    return torch.cat([gradients[n].flatten() for n in names]).double()


def watched(stream, reference=10**6):
    strategy = Watched(memory=20, reference=reference)
    learner = make_learner(stream, optimizer=functools.partial(SGD, lr=0.2))
    for task in stream:
        learn(learner, strategy, task, epochs=4)
    return strategy


def test_steps_are_those_of_the_paper():
    strategy = watched(make_stream(tasks=3))
    kinds = set()
    for before, r, after in strategy.seen:
        if r is None:
            kinds.add("first task")
            assert all(torch.equal(before[n], after[n]) for n in before)
            continue
        names = list(before)
        g, ref, now = flat(before, names), flat(r, names), flat(after, names)
        if g @ ref >= 0:
            kinds.add("free")
            assert torch.equal(g, now)  # to the bit
        else:
            kinds.add("projected")
            torch.testing.assert_close(now, g - (g @ ref) / (ref @ ref) * ref, atol=1e-6, rtol=1e-5)
            assert now @ ref >= -1e-6 * now.norm() * ref.norm()
    assert kinds == {"first task", "free", "projected"}


def test_a_step_down_the_projected_gradient_does_not_raise_the_old_loss():
    stream = make_stream(tasks=2)
    strategy = AGEM(memory=40, reference=10**6)
    learner = make_learner(stream, optimizer=functools.partial(SGD, lr=1e-3)).double()
    for task in stream:
        task.data.tensors["x"] = task.data.tensors["x"].double()
    learn(learner, strategy, stream[0], epochs=3)
    learner.begin(stream[1], strategy)
    rises, free = [], []
    for rule, found in ((strategy, rises), (Finetune(), free)):
        for batch in stream[1].everything["x"].double().split(8):
            start = weights(learner)
            y = stream[1].everything["y"][:8]
            gradients = learner.gradients({"x": batch, "y": y}, mode="train")
            for name, p in learner.named_trainable().items():
                p.grad = gradients[name].clone()
            rule.constrain(learner)
            with torch.no_grad():
                old = learner.loss(learner(strategy.kept.batch), strategy.kept.batch)
                for p in learner.trainable_parameters():
                    p -= 1e-4 * p.grad
                new = learner.loss(learner(strategy.kept.batch), strategy.kept.batch)
            found.append(float(new - old))
            learner.load_weights({**learner.weights(), **start})
    assert max(rises) < 1e-8  # the second order
    assert max(free) > 1e-6  # the control: without the rule some steps do


def test_the_memory_holds_so_many_samples_of_every_task():
    stream = make_stream(tasks=3)
    strategy = watched(stream)
    assert len(strategy.kept.batch["y"]) == 3 * 20
    for t, task in enumerate(stream):
        own = strategy.kept.batch["x"][20 * t : 20 * (t + 1)]
        rows = {tuple(x.tolist()) for x in task.everything["x"]}
        assert len({tuple(x.tolist()) for x in own} & rows) == 20


def test_only_some_are_drawn_for_a_step_and_a_resumed_run_draws_on():
    one, other = AGEM(memory=20, reference=5), AGEM(memory=20, reference=5)
    stream = make_stream(tasks=2)
    learner = make_learner(stream)
    learn(learner, one, stream[0], epochs=1)
    other.load_state_dict(one.state_dict())
    drawn = [torch.randperm(20, generator=s.rng)[:5].tolist() for s in (one, other)]
    assert drawn[0] == drawn[1]
