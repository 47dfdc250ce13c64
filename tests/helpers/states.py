"""Strategies whose state went through a file."""

import copy
import io

import torch
from torch import nn
from toys import learn, learn_stream, make_learner, make_stream, weights

from cl_bench.strategies.penalty.ewc import EWC


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_goes_on_the_same(make, optimizer=None, tasks=3):
    """Two tasks, a round trip of the state, and a third task learned twice."""
    stream = make_stream(tasks=tasks)
    learner, strategy = make_learner(stream, optimizer=optimizer), make()
    learn_stream(learner, strategy, stream[:-1])
    twin, again = copy.deepcopy(learner), make()
    again.load_state_dict(through_a_file(strategy.state_dict()))
    for one, rule in ((learner, strategy), (twin, again)):
        learn(one, rule, stream[-1])
    for name, weight in weights(learner).items():
        assert torch.equal(weight, weights(twin)[name]), name
    return strategy, again


def with_quadratics(decay=1.0, tasks=3, strength=7.0, **options):
    """EWC after some tasks of one weight matrix, and each task's own (F, theta)."""
    stream = make_stream(tasks=tasks)
    learner = make_learner(stream, nn.Flatten())
    ewc = EWC(strength, decay=decay, samples=40, **options)
    quadratics = []
    for task in stream:
        learner.begin(task, ewc)
        with torch.no_grad():
            learner.heads[0].weight.normal_()
        stats = ewc.collect(learner, task)
        quadratics.append(
            (stats["heads.0.weight"] / stats["samples"], learner.heads[0].weight.detach().clone())
        )
        ewc.consolidate(learner, task, stats)
    return stream, learner, ewc, quadratics


def penalty_at(ewc, learner, stream, theta):
    weight = learner.heads[0].weight
    weight.data.copy_(theta)
    weight.grad = None
    value = ewc.penalty(learner, stream[-1].everything, torch.empty(0))
    value.backward()
    return float(value.detach()), weight.grad.clone()
