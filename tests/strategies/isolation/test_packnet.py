"""PackNet: who owns what, and that it is kept to the bit."""

import functools

import pytest
import torch
from torch.optim import SGD, Adam
from toys import cnn, make_learner, make_stream, mlp, weights

from cl_bench.contracts import UsageError
from cl_bench.experiment import TrainLoader, check_pair
from cl_bench.strategies.isolation.packnet import PackNet

OPTIMIZERS = {
    "sgd": functools.partial(SGD, lr=0.1),
    "momentum and decay": functools.partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.05),
    "adam": functools.partial(Adam, lr=0.01, weight_decay=0.05),
}


def begin(strategy, optimizer="momentum and decay", scenario="task", tasks=3, model=None, **stream):
    stream = make_stream(scenario, tasks=tasks, **stream)
    model = model or mlp(bias=True)
    learner = make_learner(stream, model, OPTIMIZERS[optimizer], head_bias=True)
    return stream, learner


def learn(strategy, learner, task, epochs=2):
    """A task and its phase, in a plain loop."""

    def train():
        optimizer = learner.configure_optimizers()
        for _ in range(epochs):
            for batch in TrainLoader(task.train, 10, 0, task.index):
                loss = learner.training_step(batch, 0)
                optimizer.zero_grad()
                loss.backward()
                strategy.constrain(learner)
                optimizer.step()
        learner.leave()

    learner.begin(task, strategy)
    learner.train()
    train()
    for phase in strategy.phases(learner, task):
        phase.prepare(learner)
        learner.enter(phase)
        train()
    strategy.consolidate(learner, task, strategy.collect(learner, task))
    strategy.release(learner)


def logits(strategy, learner, task):
    with torch.no_grad(), learner.evaluating(), strategy.inference(learner, task):
        return learner(task.everything, head=task.head)


@pytest.mark.parametrize(
    ("scenario", "kind"),
    [("domain", "sgd"), ("task", "momentum and decay"), ("domain", "adam")],
)
def test_what_is_owned_never_moves_and_old_logits_stay(scenario, kind):
    strategy = PackNet()
    stream, learner = begin(strategy, kind, scenario)
    known, answers = {}, []
    for t, task in enumerate(stream):
        learn(strategy, learner, task)
        now = weights(learner)
        for name, owner in strategy.owner.items():
            for j in range(t):
                assert torch.equal(now[name][owner == j + 1], known[name, j]), (name, j)
            known[name, t] = now[name][owner == t + 1]
            assert (now[name][owner == 0] == 0).all()
        answers.append(logits(strategy, learner, task))
        before = weights(learner)
        for j in range(t + 1):
            assert torch.equal(logits(strategy, learner, stream[j]), answers[j])
        assert all(torch.equal(w, before[n]) for n, w in weights(learner).items())
    with torch.no_grad(), learner.evaluating():  # the control: with later tasks' weights
        shown = learner(stream[0].everything, head=0)
    assert not torch.equal(shown, answers[0])


class OnlyGradients(PackNet):
    """As published: nothing is put back."""

    def after_step(self, learner, batch, out):
        pass


def test_zeroed_gradients_alone_do_not_keep_it():
    strategy = OnlyGradients()
    stream, learner = begin(strategy)
    learn(strategy, learner, stream[0])
    before = weights(learner)
    learn(strategy, learner, stream[1])
    name = "backbone.fc1.weight"
    own = strategy.owner[name] == 1
    assert not torch.equal(weights(learner)[name][own], before[name][own])


@pytest.mark.parametrize(("prune", "epochs"), [(0.5, 0), (0.75, 1)])
def test_ownership_partitions_every_layer_by_the_schedule(prune, epochs):
    strategy = PackNet(prune, epochs)
    stream, learner = begin(strategy)
    free = {n: p.numel() for n, p in strategy.targets(learner).items()}
    assert set(free) == {"backbone.fc1.weight", "backbone.fc2.weight"}
    for t, task in enumerate(stream):
        learn(strategy, learner, task)
        for name, owner in strategy.owner.items():
            left = int(prune * free[name])
            counts = torch.bincount(owner.flatten().long(), minlength=t + 2)
            assert counts[0] == left
            assert counts[t + 1] == free[name] - left
            assert counts.sum() == owner.numel()
            values = strategy.metrics()[name.removesuffix(".weight")]
            assert values["capacity_left"] == pytest.approx(left / owner.numel())
            free[name] = left


def test_the_smallest_are_pruned_and_only_the_rest_is_fine_tuned():
    strategy = PackNet(0.5, 1)
    stream, learner = begin(strategy, tasks=2)
    seen = {}
    share_out = strategy.share_out

    def watching(learner):
        seen["before"] = weights(learner)
        share_out(learner)
        seen["after"] = weights(learner)

    strategy.share_out = watching
    for t, task in enumerate(stream):
        learn(strategy, learner, task)
        for name, owner in strategy.owner.items():
            trained, pruned, end = seen["before"][name], seen["after"][name], weights(learner)[name]
            own = owner == t + 1
            assert trained[own].abs().min() >= trained[owner == 0].abs().max()
            assert torch.equal(pruned[own], trained[own])
            assert not torch.equal(end[own], pruned[own])
            assert torch.equal(end[~own], pruned[~own])
        bias = "backbone.fc1.bias"
        kept = torch.equal(weights(learner)[bias], seen["after"][bias])
        assert kept == (t > 0), "biases train on the first task alone"


def test_a_task_under_way_is_hidden_from_earlier_ones():
    strategy = PackNet()
    stream, learner = begin(strategy, tasks=2)
    learn(strategy, learner, stream[0])
    answer = logits(strategy, learner, stream[0])
    learner.begin(stream[1], strategy)
    with torch.no_grad():
        for name, p in strategy.weights.items():
            p[strategy.owner[name] == 0] = 1.0
    assert torch.equal(logits(strategy, learner, stream[0]), answer)
    with strategy.inference(learner, stream[1]):
        assert all((p != 0).all() for p in strategy.weights.values())


def test_convolutions_share_their_weights_out_too():
    strategy = PackNet()
    stream, learner = begin(strategy, tasks=2, model=cnn(), shape=(2, 6, 6))
    learn(strategy, learner, stream[0])
    answer = logits(strategy, learner, stream[0])
    learn(strategy, learner, stream[1])
    assert torch.equal(logits(strategy, learner, stream[0]), answer)
    assert len(strategy.owner) == 4  # one a layer, also where it has groups


def test_it_is_refused_where_it_cannot_work():
    stream = make_stream("class")
    with pytest.raises(UsageError, match="task id"):
        check_pair("packnet", PackNet(), stream)
    with pytest.raises(UsageError, match="federation"):
        check_pair("packnet", PackNet(), make_stream("task"), True)
    with pytest.raises(UsageError, match=r"strategy\.prune=1\.0"):
        PackNet(prune=1.0)
