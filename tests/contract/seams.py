"""Toy strategies, one for each seam of the contract that no plain update rule needs."""

from contextlib import contextmanager

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from cl_bench.contracts import (
    LOCAL_OR_FEDERATED,
    FederatedStrategy,
    Loss,
    Needs,
    Phase,
    Plan,
    Strategy,
)


class MaskedSoftmax(FederatedStrategy):
    """``objective``: only the classes of the task that is learned compete."""

    needs = Needs(engines=LOCAL_OR_FEDERATED)
    scenario = "class"

    def setup(self, learner, task):
        self.classes = task.classes

    def objective(self, learner, batch, out):
        other = torch.ones(out.shape[1], dtype=torch.bool)
        other[self.classes.start : self.classes.stop] = False
        masked = out.masked_fill(other.to(out.device), -torch.inf)
        return Loss(F.cross_entropy(masked, batch["y"], reduction="sum"), len(out))


class HalfWeighted(Strategy):
    """``objective`` with a count that is not the number of samples: odd ones count half."""

    def objective(self, learner, batch, out):
        weight = torch.where(batch["x"][:, 0] > 0, 1.0, 0.5).to(out)
        return Loss(
            (weight * F.cross_entropy(out, batch["y"], reduction="none")).sum(), weight.sum()
        )


class Residual(FederatedStrategy):
    """``modules``: a layer of its own that persists over tasks, and a further one a task."""

    needs = Needs(engines=LOCAL_OR_FEDERATED)

    def __init__(self):
        self.tasks = 0
        self.handle = None

    def modules(self, learner):
        return {f"task{t}": nn.Linear(16, 16) for t in range(self.tasks + 1)}

    def setup(self, learner, task):
        own = learner.extras(self)
        for t in range(self.tasks):
            own[f"task{t}"].requires_grad_(False)
        self.attach(learner, range(self.tasks + 1))

    def attach(self, learner, tasks):
        own = learner.extras(self)

        def add(module, given, out):
            return out + sum(own[f"task{t}"](out) for t in tasks)

        self.handle = learner.network.backbone.register_forward_hook(add)

    def consolidate(self, learner, task, stats):
        self.tasks += 1

    def release(self, learner):
        if self.handle is not None:
            self.handle.remove()
        self.handle = None

    @contextmanager
    def inference(self, learner, task):
        inside = self.handle is not None
        if not inside:
            self.attach(learner, range(self.tasks))
        yield
        if not inside:
            self.release(learner)

    def state_dict(self):
        return {"tasks": self.tasks}

    def load_state_dict(self, state):
        self.tasks = state["tasks"]


class Part:
    """Some rows of a task's data."""

    def __init__(self, data, rows):
        self.data, self.rows = data, rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.data[self.rows[index]]


class Corrected(Strategy):
    """``plan``, ``phases`` and ``predict``: a second stage learns two numbers on samples apart."""

    def __init__(self):
        self.prepared = 0
        self.steps = 0

    def modules(self, learner):
        return {"line": nn.Linear(1, 1)}

    def setup(self, learner, task):
        learner.hold(learner.extras(self).values())

    def plan(self, stream, t):
        data = stream[t].train
        return Plan(Part(data, torch.arange(len(data))[: 3 * len(data) // 4]))

    def phases(self, learner, task):
        data = task.train
        apart = Part(data, torch.arange(len(data))[3 * len(data) // 4 :])
        line = learner.extras(self)["line"]

        def prepare(learner):
            self.prepared += 1
            nn.init.ones_(line.weight)
            nn.init.zeros_(line.bias)

        def groups(learner):
            return [{"params": line.parameters()}]

        return [Phase("line", apart, 2, groups, self.corrected_loss, prepare)]

    def corrected_loss(self, learner, batch, out):
        out = self.correct(learner, out)
        return Loss(F.cross_entropy(out, batch["y"], reduction="sum"), len(out))

    def correct(self, learner, out):
        line = learner.extras(self)["line"]
        last = torch.arange(out.shape[1], device=out.device) == out.shape[1] - 1
        return torch.where(last, out * line.weight[0] + line.bias, out)

    def after_step(self, learner, batch, out):
        self.steps += 1

    def predict(self, learner, batch, task):
        return self.correct(learner, learner(batch))

    def state_dict(self):
        return {"prepared": self.prepared, "steps": self.steps}

    def load_state_dict(self, state):
        self.prepared, self.steps = state["prepared"], state["steps"]


class TwoLosses(Strategy):
    """``gradients`` inside ``constrain``: old samples' loss and new ones' under PCGrad."""

    needs = Needs(rewrites_gradients=True)

    def __init__(self):
        self.memory = {}

    def constrain(self, learner):
        if not self.memory:
            return
        old = learner.gradients(self.memory, mode="train")
        named = {n: p for n, p in learner.named_trainable().items() if p.grad is not None}
        one = torch.cat([p.grad.flatten() for p in named.values()])
        two = torch.cat([old[n].flatten() for n in named])
        product = one @ two
        if product < 0:
            one, two = one - product / (two @ two) * two, two - product / (one @ one) * one
        start = 0
        for parameter in named.values():
            size = parameter.numel()
            parameter.grad.copy_((one + two)[start : start + size].view_as(parameter))
            start += size

    def consolidate(self, learner, task, stats):
        self.memory = task.sample(16, learner.seed)

    def state_dict(self):
        return {"memory": dict(self.memory)}

    def load_state_dict(self, state):
        self.memory = dict(state["memory"])


class Average(FederatedStrategy):
    """``plan(start="initial")``: every task is learned from the first weights, then merged."""

    needs = Needs(engines=LOCAL_OR_FEDERATED)

    def __init__(self):
        self.tasks = 0
        self.merged = {}

    def plan(self, stream, t):
        return Plan(stream[t].train, start="initial")

    def consolidate(self, learner, task, stats):
        learned = {k: v for k, v in learner.weights().items() if not k.startswith("heads.")}
        for name, weight in learned.items():
            before = self.merged.get(name, torch.zeros_like(weight)).to(weight)
            self.merged[name] = (self.tasks * before + weight) / (self.tasks + 1)
        self.tasks += 1
        learner.load_weights({**learner.weights(), **self.merged})

    def state_dict(self):
        return {"tasks": self.tasks, "merged": dict(self.merged)}

    def load_state_dict(self, state):
        self.tasks, self.merged = state["tasks"], dict(state["merged"])


SEAMS = ("MaskedSoftmax", "HalfWeighted", "Residual", "Corrected", "TwoLosses", "Average")
