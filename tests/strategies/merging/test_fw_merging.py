"""FW-Merging: a merge inside the models' hull that lowers the loss of all tasks."""

import functools

import pytest
import torch
from toys import make_engine, make_learner, make_stream

from cl_bench.merging import FrankWolfe
from cl_bench.strategies.merging.fw_merging import FWMerging

adam = functools.partial(torch.optim.Adam, lr=0.01)


def learned(scenario="domain", kind=FWMerging, **options):
    stream, strategy = make_stream(scenario, 3), kind(**options)
    learner = make_learner(stream, optimizer=adam)
    engine = make_engine(learner, strategy)
    for t, task in enumerate(stream):
        engine.learn(task, strategy.plan(stream, t))
    return learner, strategy


def loss(learner, batch):
    return learner.loss(learner(batch), batch).item()


def test_the_network_is_the_frank_wolfe_merge_of_models_trained_apart():
    learner, strategy = learned(memory=20)
    assert strategy.exemplars == 60
    models = strategy.models
    names = [name for name, _ in learner.named_parameters()]
    average = {n: torch.stack([m[n] for m in models]).mean(0) for n in names}
    found = {n: w.clone() for n, w in learner.weights().items()}

    def gradient(theta):  # by autograd alone
        learner.load_weights({**found, **theta})
        learner.eval()
        parameters = dict(learner.named_parameters())
        values = learner.loss(learner(strategy.kept), strategy.kept)
        return dict(zip(names, torch.autograd.grad(values, list(parameters.values())), strict=True))

    wanted = FrankWolfe().merge(average, [{n: m[n] for n in names} for m in models], gradient)
    for name in names:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-7)


def test_steps_lower_the_loss_of_the_average_and_more_go_further():
    losses = []
    for iterations, scale in ((1, 1e-6), (10, 0.3), (40, 1.0)):
        learner, strategy = learned(memory=50, iterations=iterations, scale=scale, step=1.0)
        losses.append(loss(learner, strategy.kept))
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("scenario", ["task", "class"])
def test_heads_of_one_task_each_stay_as_it_left_them(scenario):
    heads = {}

    class Watch(FWMerging):
        def consolidate(self, learner, task, stats):
            heads[task.head] = learner.heads[task.head].weight.detach().clone()
            super().consolidate(learner, task, stats)

    learner, _ = learned(scenario, Watch, memory=10)
    assert len(heads) == 3
    for head, weight in heads.items():
        assert torch.equal(learner.heads[head].weight, weight)
