"""SI: the path integral is the fall of the loss, coordinate by coordinate."""

import functools

import torch
from torch import nn
from torch.optim import SGD, Adam
from toys import learn, make_learner, make_stream, weights

from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.penalty.si import SI

CURVATURE = torch.tensor([1.0, 4.0, 0.5, 0.0], dtype=torch.float64)
OPTIMUM = torch.tensor([1.0, -1.0, 2.0, 5.0], dtype=torch.float64)


class Bowl:
    """sum_i h_i (theta_i - o_i)^2 / 2, as a learner."""

    def __init__(self):
        self.theta = nn.Parameter(torch.zeros(4, dtype=torch.float64))

    def named_trainable(self):
        return {"theta": self.theta}

    @property
    def losses(self):
        return 0.5 * CURVATURE * (self.theta - OPTIMUM).square()

    def descend(self, strategy, steps, lr, optimizer=SGD):
        """Returns the sum of -grad times step, with the penalty's part in it."""
        optimizer, naive = optimizer([self.theta], lr=lr), torch.zeros(4, dtype=torch.float64)
        for _ in range(steps):
            optimizer.zero_grad()
            penalty = strategy.penalty(self, {}, self.theta)
            (self.losses.sum() + (0 if penalty is None else penalty)).backward()
            strategy.constrain(self)
            before = self.theta.detach().clone()
            optimizer.step()
            strategy.after_step(self, {}, self.theta)
            naive -= self.theta.grad * (self.theta.detach() - before)
        return naive


def test_the_path_integral_is_the_fall_of_the_loss():
    bowl, strategy = Bowl(), SI()
    strategy.setup(bowl, None)
    start = bowl.losses.detach()
    bowl.descend(strategy, 800, 5e-3)
    fall = start - bowl.losses.detach()
    torch.testing.assert_close(strategy.path["theta"], fall, atol=1e-6, rtol=1.5e-2)
    assert (fall[:3] > 0.45).all()
    coarse = SI()  # the control: steps that are not small
    other = Bowl()
    coarse.setup(other, None)
    other.descend(coarse, 50, 0.3)
    assert ((coarse.path["theta"] - start + other.losses.detach()).abs() > 0.05).any()


def test_importance_and_its_sign():
    for negative in ("keep", "drop"):
        bowl, strategy = Bowl(), SI(damping=0.1, negative=negative)
        strategy.setup(bowl, None)
        strategy.path = {"theta": torch.tensor([1.0, -2.0, 0.5, 0.0]).double()}
        with torch.no_grad():
            bowl.theta += torch.tensor([0.0, 1.0, -2.0, 3.0])
        strategy.consolidate(bowl, None, {})
        wanted = torch.tensor([10.0, -2 / 1.1, 0.5 / 4.1, 0.0]).double()
        wanted = wanted if negative == "keep" else wanted.clamp(min=0)
        torch.testing.assert_close(strategy.importance["theta"], wanted)


def test_the_penalty_pulls_and_has_no_part_in_the_path():
    for optimizer in (SGD, Adam):  # also where a step is not along the gradient
        bowl, strategy = Bowl(), SI(strength=2.0)
        strategy.importance = {"theta": torch.tensor([3.0, 0.1, 1.0, 2.0]).double()}
        strategy.centre = {"theta": torch.full((4,), -1.0).double()}
        strategy.setup(bowl, None)
        start = bowl.losses.detach()
        naive = bowl.descend(strategy, 500, 6e-3, optimizer)
        fall = start - bowl.losses.detach()
        torch.testing.assert_close(strategy.path["theta"], fall, atol=1e-3, rtol=2e-2)
        assert ((naive - fall).abs() > 0.3).any()  # the control: with the penalty's gradient
        assert bowl.theta[0] < 0, "it is pulled uphill"
        assert strategy.path["theta"][3].abs() < 1e-9, "no loss falls along a flat coordinate"


def test_a_network_adds_up_the_fall_of_its_loss():
    """Full batches, so that the loss that falls is the one whose gradient is followed."""
    stream = make_stream(tasks=1, n=40)
    stream[0].data.tensors["x"] = stream[0].data.tensors["x"].double()
    factory = functools.partial(SGD, lr=1e-3)
    learner = make_learner(stream, optimizer=factory, batch_size=40).double()
    strategy, batch = SI(), stream[0].everything
    paths = []
    strategy.consolidate = lambda *_: paths.append(dict(strategy.path))
    before = float(learner.loss(learner(batch), batch).detach())
    learn(learner, strategy, stream[0], epochs=60, batch_size=40)
    fall = before - float(learner.loss(learner(batch), batch).detach())
    total = sum(float(w.sum()) for w in paths[0].values())
    assert fall > 0.01
    assert abs(total - fall) < 0.01 * fall


def test_without_strength_it_is_finetune():
    found = []
    for strategy in (SI(strength=0.0), Finetune()):
        stream = make_stream(tasks=2)
        learner = make_learner(stream)
        for task in stream:
            learn(learner, strategy, task, epochs=2)
        found.append(weights(learner))
    assert all(torch.equal(w, found[1][name]) for name, w in found[0].items())
