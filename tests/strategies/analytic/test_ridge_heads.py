"""RanPAC and ACIL: one ridge regression, whatever the order and division of the samples."""

import copy

import numpy as np
import pytest
import torch
from closed import double, learned, union
from toys import ToyTask, make_stream

from cl_bench.contracts import Stream, UsageError
from cl_bench.models import Identity
from cl_bench.strategies.analytic.acil import ACIL
from cl_bench.strategies.analytic.ranpac import RanPAC

HEADS = {
    "ranpac": lambda: RanPAC(width=30, strengths=[0.01, 1.0, 100.0]),
    "acil": lambda: ACIL(width=30, epochs=0),
    "decorrelated": lambda: RanPAC(width=0),
}
every = pytest.mark.parametrize("name", HEADS)


def by_numpy(learner, strategy, stream):
    """Ridge regression on all samples at once, of the strength that the strategy came to."""
    batch = union(stream)
    with torch.no_grad():
        f = learner.backbone(batch["x"]).double().numpy()
    R = strategy._projection
    H = f if R is None else np.maximum(f @ R.double().numpy(), 0)
    Y = np.eye(int(batch["y"].max()) + 1)[batch["y"].numpy()]
    strength = strategy.solve()[0]
    return np.linalg.solve(H.T @ H + strength * np.eye(H.shape[1]), H.T @ Y)


@every
@pytest.mark.parametrize("scenario", ["class", "domain", "task"])
def test_task_by_task_is_at_once(name, scenario):
    stream = double(make_stream(scenario))
    learner, strategy, engine = learned(stream, HEADS[name](), dtype=torch.float64)
    wanted = torch.from_numpy(by_numpy(learner, strategy, stream))
    torch.testing.assert_close(strategy.solve()[1], wanted, atol=1e-10, rtol=1e-10)
    scores = engine.evaluate(list(stream), 100, None)
    assert min(scores.values()) > 0.6


def test_acils_recursion_comes_to_the_same():
    """Batch by batch, classes growing, with K = (I + H R H^T)^-1."""
    stream = double(make_stream("class"))
    learner, strategy, _ = learned(stream, ACIL(width=30, gamma=0.3, epochs=0), dtype=torch.float64)
    R, W = torch.eye(30).double() / 0.3, torch.zeros(30, 0).double()
    for task in stream:
        W = torch.cat([W, torch.zeros(30, task.classes.stop - W.shape[1])], dim=1)
        for rows in torch.split(torch.arange(len(task.train)), 7):
            batch = task.train[rows]
            with torch.no_grad():
                H = strategy.read(learner, batch)
            Y = torch.eye(W.shape[1]).double()[batch["y"]]
            K = torch.linalg.inv(torch.eye(len(H)) + H @ R @ H.t())
            R = R - R @ H.t() @ K @ H @ R
            W = W + R @ H.t() @ (Y - H @ W)
    torch.testing.assert_close(strategy.solve()[1], W, atol=1e-9, rtol=1e-9)


def parted(stream):
    """The same samples as twice as many tasks of the same classes, and of uneven sizes."""
    tasks = []
    for task in stream:
        for rows in (slice(0, 13), slice(13, None)):
            tasks.append(some(task, rows, len(tasks)))
    return Stream("toy", tasks, stream.scenario, stream.input_shape, "toy")


def some(task, rows, index=0):
    """Samples of a task as a task."""
    x, y = (task.data.tensors[k][rows] for k in "xy")
    found = ToyTask(index, task.head, task.classes, x.float(), y)
    found.data.tensors["x"] = x
    return found


@every
def test_neither_order_nor_batches_nor_tasks_matter(name):
    stream = double(make_stream("class"))
    one = learned(stream, HEADS[name](), dtype=torch.float64)[1]
    for other, order, size in (
        (stream, (2, 0, 1), 10),
        (stream, None, 7),
        (parted(stream), (3, 0, 5, 2, 1, 4), 10),
    ):
        found = learned(other, HEADS[name](), order, size, dtype=torch.float64)[1]
        assert found.solve()[0] == one.solve()[0]
        torch.testing.assert_close(found.solve()[1], one.solve()[1], atol=1e-10, rtol=1e-10)


@every
def test_clients_sums_are_the_sums_of_all(name):
    stream = double(make_stream("domain"))
    learner, whole, _ = learned(stream, HEADS[name](), dtype=torch.float64)
    server = HEADS[name]()
    server.check(learner)
    for task in stream:
        sums = {}
        for rows in (slice(0, 9), slice(9, 30), slice(30, None)):
            client = HEADS[name]()
            client.load_state_dict(server.state_dict())
            sent = client.collect(learner, some(task, rows))
            sums = {k: v + sums[k] if sums else v for k, v in sent.items()}
        server.consolidate(learner, task, sums)
    assert server.solve()[0] == whole.solve()[0]
    torch.testing.assert_close(server.solve()[1], whole.solve()[1], atol=1e-10, rtol=1e-10)


@every
def test_a_samples_logits_do_not_depend_on_its_batch(name):
    stream = make_stream("class")
    learner, strategy, _ = learned(stream, HEADS[name]())
    batch = union(stream)
    with torch.no_grad():
        together = strategy.predict(learner, batch, None)
        shuffled = torch.randperm(len(together))
        mixed = strategy.predict(learner, {k: v[shuffled] for k, v in batch.items()}, None)
        alone = strategy.predict(learner, {k: v[:1] for k, v in batch.items()}, None)
    torch.testing.assert_close(mixed, together[shuffled], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone, together[:1], atol=1e-5, rtol=1e-5)


@every
def test_no_epochs_leave_the_bits(name):
    stream = make_stream("class")
    before = copy.deepcopy(learned(stream, HEADS[name](), order=[0])[0].weights())
    after = learned(stream, HEADS[name]())[0].weights()
    assert before.keys() == after.keys()
    assert all(torch.equal(v, before[k]) for k, v in after.items())


@pytest.mark.parametrize("make", [lambda: ACIL(width=30), lambda: RanPAC(width=30, epochs=2)])
def test_the_first_task_may_train_the_network_and_no_other(make):
    stream = make_stream("class")
    start = learned(stream, HEADS["acil"]())[0].backbone.state_dict()
    first = learned(stream, make(), order=[0])[0].backbone.state_dict()
    last = learned(stream, make())[0].backbone.state_dict()
    assert not any(torch.equal(first[k], start[k]) for k in start)
    assert all(torch.equal(first[k], last[k]) for k in start)


def test_the_strength_chosen_errs_least_on_what_is_held_out():
    stream = double(make_stream("class"))
    learner, strategy, _ = learned(
        stream, RanPAC(30, [1e-4, 1e-2, 1.0, 1e2, 1e4]), dtype=torch.float64
    )
    batch = union(stream)
    held = strategy.part_of(batch).bool()
    assert 10 < held.sum() < 40
    with torch.no_grad():
        H = strategy.read(learner, batch)
    Y = torch.eye(9).double()[batch["y"]]
    errors = {}
    for s in strategy.strengths:
        G = H[~held].t() @ H[~held] + s * torch.eye(30)
        W = torch.linalg.solve(G, H[~held].t() @ Y[~held])
        errors[s] = float((H[held] @ W - Y[held]).square().sum())
    assert strategy.solve()[0] == min(errors, key=errors.get)
    assert strategy.metrics()["ridge"] == {"lambda": strategy.solve()[0], "width": 30.0}


def test_a_sample_is_held_out_by_itself_and_its_copies_with_it():
    strategy = RanPAC()
    x = torch.randn(4000, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    batch = {"x": x, "y": torch.zeros(4000).long()}
    part = strategy.part_of(batch)
    assert 0.17 < part.double().mean() < 0.23
    some = torch.randint(4000, (50,))
    again = strategy.part_of({k: v[some] for k, v in batch.items()})
    assert torch.equal(again, part[some])
    assert not RanPAC(strengths=[1.0]).part_of(batch).any()


def test_the_random_features_are_the_seeds():
    stream = make_stream("class")
    learner, run, _ = learned(stream, RanPAC(30))  # the run's seed, 0
    same, other = (learned(stream, RanPAC(30, seed=s))[1] for s in (0, 1))
    assert torch.equal(run._projection, same._projection)
    assert not torch.equal(run._projection, other._projection)
    resumed = RanPAC(30)
    resumed.load_state_dict(other.state_dict())
    batch = stream[0].everything
    with torch.no_grad():
        wanted = other.predict(learner, batch, None)
        torch.testing.assert_close(resumed.predict(learner, batch, None), wanted, atol=0, rtol=0)


def test_a_large_strength_matches_the_sums_of_classes():
    """W -> Q / lambda."""
    stream = double(make_stream("class"))
    strategy = learned(stream, RanPAC(0, [1e12]), dtype=torch.float64)[1]
    W = 1e12 * strategy.solve()[1]
    torch.testing.assert_close(W, strategy.sums[0].t(), atol=1e-6, rtol=1e-6)


def test_what_cannot_be_is_refused():
    stream = make_stream("class")
    with pytest.raises(UsageError, match=r"nothing but heads to train.*strategy\.epochs=0"):
        learned(stream, ACIL(), model=Identity())
    learned(stream, ACIL(width=30, epochs=0), model=Identity())
    with pytest.raises(UsageError, match=r"lambda=1e-300 .* allow a larger one"):
        learned(stream, RanPAC(200, [1e-300]))
