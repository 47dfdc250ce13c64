"""Strategies that each break one law."""

import functools

import torch

from cl_bench.contracts import Strategy, UsageError


class Forgetful(Strategy):
    """Remembers what training needs later, and saves none of it."""

    anchor = None

    def penalty(self, learner, batch, out):
        if self.anchor is None:
            return None
        now = learner.named_trainable()
        return sum(((now[name] - old) ** 2).sum() for name, old in self.anchor.items())

    def consolidate(self, learner, task, stats):
        self.anchor = {name: p.detach().clone() for name, p in learner.named_trainable().items()}


class ForgetfulInside(Strategy):
    """Counts steps, which change what it does, and saves none of them."""

    steps = 0

    def constrain(self, learner):
        self.steps += 1
        for parameter in learner.trainable_parameters():
            parameter.grad.mul_(1 / (1 + self.steps))


class Selfish(Strategy):
    """Follows the samples of its own process."""

    seen = 0.0

    def after_step(self, learner, batch, out):
        self.seen = float(batch["x"].abs().mean())

    def constrain(self, learner):
        for parameter in learner.trainable_parameters():
            parameter.grad.mul_(1 + self.seen)


class CountsBatches(Strategy):
    """Its penalty follows how many batches there were, not how many steps."""

    batches = 0

    def penalty(self, learner, batch, out):
        self.batches += 1
        return 0.01 * self.batches * sum((p**2).sum() for p in learner.trainable_parameters())


class Halving(Strategy):
    """Leaves weights in half precision."""

    def consolidate(self, learner, task, stats):
        for parameter in learner.trainable_parameters():
            parameter.data = parameter.data.bfloat16()


class Exploding(Strategy):
    """What it remembers is not finite."""

    def state_dict(self):
        return {"memory": torch.full((2,), torch.inf)}


class OnlyUnpacked(Strategy):
    """Forgets to do its work in packs."""

    def constrain(self, learner):
        if learner.automatic_optimization:
            for parameter in learner.trainable_parameters():
                parameter.grad.mul_(0.5)


class LeavesHook(Strategy):
    """A hook stays on a layer."""

    def setup(self, learner, task):
        learner.network.backbone.register_forward_hook(lambda *_: None)


class LeavesClosure(Strategy):
    """A layer's ``forward`` stays replaced by a function that holds on to the layer."""

    def setup(self, learner, task):
        layer = next(m for m in learner.network.modules() if isinstance(m, torch.nn.Linear))
        layer.forward = functools.partial(type(layer).forward, layer)


class LeavesClass(Strategy):
    """A layer stays of another class."""

    def setup(self, learner, task):
        layer = next(m for m in learner.network.modules() if isinstance(m, torch.nn.Linear))
        layer.__class__ = type("Attached", (type(layer),), {})


class LeavesParameter(Strategy):
    """A layer keeps a parameter more."""

    def setup(self, learner, task):
        learner.network.backbone.more = torch.nn.Parameter(torch.zeros(1))


class LeavesFrozen(Strategy):
    """Freezes for good what it should hold until the next task."""

    def setup(self, learner, task):
        learner._learnable -= set(learner.heads.parameters())
        learner.hold(learner.heads)


class Refusing(Strategy):
    """Refuses to run."""

    def check(self, learner):
        raise UsageError("strategy.x=1: not with this network")


class AsksTwice(Strategy):
    """Answers by two passes, and says one."""

    def predict(self, learner, batch, task):
        return learner(batch) + learner.readout(learner.features(batch))
