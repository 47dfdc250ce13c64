"""Gradient surgery: what the directions promise, and that they are the formulas'."""

import functools
import importlib.util

import pytest
import torch
from torch.optim import SGD
from toys import learn, make_learner, make_stream, mlp, weights

from cl_bench.contracts import UsageError
from cl_bench.strategies.surgery.bloop import Bloop
from cl_bench.strategies.surgery.second import divergence
from cl_bench.strategies.surgery.surgery import Surgery

needs_torchjd = pytest.mark.skipif(
    importlib.util.find_spec("torchjd") is None, reason="needs cl_bench[surgery]: torchjd"
)
AGGREGATORS = ["upgrad", "dualproj", "pcgrad", "mgda", "aligned_mtl", "imtl_g", "mean"]


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients.values()]).clone()


def at_a_step(strategy, tasks=2, scenario="domain"):
    """A learner whose gradients are a batch's, of the task after those that are remembered."""
    stream = make_stream(scenario, tasks=tasks)
    learner = make_learner(stream, mlp()).double()
    for task in stream:
        task.data.tensors["x"] = task.data.tensors["x"].double()
    for task in list(stream)[:-1]:
        learner.begin(task, strategy)
        strategy.consolidate(learner, task, {})
    learn(learner, strategy, stream[tasks - 2], epochs=2)
    learner.begin(stream[tasks - 1], strategy)
    strategy.kept = strategy.kept[: tasks - 1]
    backward(learner, stream[tasks - 1], 0)
    return learner, stream[tasks - 1]


def backward(learner, task, start):
    learner.train()
    learner.zero_grad()
    batch = task.train[torch.arange(start, start + 10)]
    learner.loss(learner(batch), batch).backward()


def step_of(strategy, moved=0.1, **options):
    """The batch's gradient g, those of old tasks, and d."""
    learner, task = at_a_step(strategy, **options)
    with torch.no_grad():
        for parameter in learner.parameters():  # as if steps had been taken: old answers differ
            parameter.mul_(1 + moved)
    backward(learner, task, 0)
    g, state = strategy.main(learner), strategy.rng.get_state()
    before = flat(g)
    others = [flat({n: row[n] for n in g}) for row in strategy.others(learner)]
    strategy.rng.set_state(state)
    strategy.constrain(learner)
    return before, others, flat(strategy.main(learner))


# --- Bloop ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", ["replay", "distillation", "memory"])
def test_the_first_step_adds_what_the_batch_does_not_see(second):
    g, others, d = step_of(Bloop(strength=0.5, second=second, memory=30), tasks=3)
    assert len(others) == (2 if second == "memory" else 1)
    a = torch.stack(others).mean(0)
    assert a.norm() > 1e-3
    assert abs((d - g) @ g) < 1e-12 * g.norm() * a.norm()
    assert torch.allclose(d, g + 0.5 * (a - (a @ g) / (g @ g) * g), atol=1e-12)


@pytest.mark.parametrize("order", ["paper", "code"])
@pytest.mark.parametrize("start", ["gradient", "zeros"])
def test_the_average_is_of_steps_before_or_of_this_one_too(order, start):
    bloop = Bloop(rho=0.25, order=order, start=start, memory=30)
    learner, task = at_a_step(bloop)
    e = None
    for t in range(3):
        backward(learner, task, 5 * t)
        g, state = bloop.main(learner), bloop.rng.get_state()
        before, (a,) = flat(g), [flat({n: r[n] for n in g}) for r in bloop.others(learner)]
        bloop.rng.set_state(state)
        bloop.constrain(learner)
        if e is None:
            e = before if start == "gradient" else torch.zeros_like(before)
        after = 0.75 * e + 0.25 * before
        on, e = e if order == "paper" else after, after
        kept = a if not on.any() else a - (a @ on) / (on @ on) * on
        assert torch.allclose(flat(bloop.main(learner)), before + 0.1 * kept, atol=1e-10)
        assert torch.allclose(flat(bloop.average), e, atol=1e-12)


def test_what_bloop_is_asked_for_changes_what_it_does():
    g, (a,), d = step_of(Bloop(main="memory", strength=0.5, memory=30))
    assert torch.allclose(d, a + 0.5 * (g - (a @ g) / (a @ a) * a), atol=1e-12)
    g, (a,), d = step_of(Bloop(rescale=True, strength=0.5, memory=30))
    assert torch.allclose(d, (g + 0.5 * (a - (a @ g) / (g @ g) * g)) / 1.5, atol=1e-12)
    bloop = Bloop(scope="layer", memory=30)
    learner, _ = at_a_step(bloop)
    before = {n: p.clone() for n, p in bloop.main(learner).items()}
    bloop.constrain(learner)
    for name, d in bloop.main(learner).items():
        moved = d - before[name]
        assert moved.norm() > 1e-9
        assert abs((moved * before[name]).sum()) < 1e-9 * moved.norm() * before[name].norm() + 1e-12


def test_bloop_without_strength_is_plain_training():
    def learned(strategy):
        stream = make_stream(tasks=2)
        learner = make_learner(stream)
        for task in stream:
            learn(learner, strategy, task, epochs=1)
        return weights(learner)

    plain = learned(Bloop(strength=0.0, memory=30))
    from cl_bench.strategies.baselines.finetune import Finetune

    assert all(torch.equal(v, plain[k]) for k, v in learned(Finetune()).items())
    assert any(not torch.equal(v, plain[k]) for k, v in learned(Bloop(memory=30)).items())


def test_a_task_begins_with_an_average_of_its_own():
    bloop = Bloop(memory=30)
    learner, task = at_a_step(bloop)
    bloop.constrain(learner)
    state = bloop.state_dict()
    assert state["average"]
    bloop.setup(learner, task)
    assert not bloop.average
    bloop.load_state_dict(state)
    assert bloop.average.keys() == state["average"].keys()


# --- aggregators ----------------------------------------------------------------------------------


@needs_torchjd
@pytest.mark.parametrize("name", AGGREGATORS)
def test_a_direction_is_the_librarys_of_the_whole_jacobian(name):
    """We take weights from the Gramian alone; the library's aggregators get all of J."""
    from torchjd import aggregation

    kinds = {"upgrad": "UPGrad", "dualproj": "DualProj", "pcgrad": "PCGrad", "mgda": "MGDA"}
    kinds |= {"aligned_mtl": "AlignedMTL", "imtl_g": "IMTLG", "mean": "Mean"}
    g, others, d = step_of(Surgery(name, memory=30))
    J = torch.stack([g, *others])
    assert J.shape[0] == 2
    assert torch.allclose(getattr(aggregation, kinds[name])()(J), d, atol=1e-6)


@needs_torchjd
@pytest.mark.parametrize("name", ["upgrad", "dualproj", "mgda"])
def test_no_objective_is_sacrificed(name):
    """Rows that conflict as they may: to first order no loss rises; a mean would have one rise."""
    surgery = Surgery(name)
    torch.manual_seed(0)
    for _ in range(10):
        J = torch.randn(3, 6, dtype=torch.float64)
        d = surgery_direction(surgery, J)
        assert (J @ d).min() > -1e-2 * J.norm() ** 2 / 3
    J = torch.tensor([[3.0, 0.0], [-1.0, 0.5]], dtype=torch.float64)
    assert (J @ surgery_direction(Surgery("mean"), J)).min() < 0
    assert (J @ surgery_direction(surgery, J)).min() > -1e-2


def surgery_direction(surgery, J):
    surgery.rng = torch.Generator().manual_seed(0)
    return surgery.weights([{"w": row} for row in J]) @ J


@needs_torchjd
@pytest.mark.parametrize(
    ("name", "expected"),
    [("upgrad", (0.1, 0.45)), ("dualproj", (0.0, 0.25)), ("pcgrad", (0.2, 0.9))],
)
def test_two_gradients_by_hand(name, expected):
    J = torch.tensor([[1.0, 0.0], [-1.0, 0.5]], dtype=torch.float64)
    found = surgery_direction(Surgery(name), J)
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), atol=2e-3)


@needs_torchjd
def test_the_order_that_pcgrad_draws_is_the_strategys_own():
    J = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    before = torch.get_rng_state()
    first = surgery_direction(Surgery("pcgrad"), J)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(77)
    assert torch.equal(first, surgery_direction(Surgery("pcgrad"), J))


@pytest.mark.parametrize("second", ["replay", "memory"])
def test_the_orthogonal_component_leaves_the_batch_its_descent(second):
    surgery = Surgery("orthogonal", strength=0.7, second=second, memory=30)
    g, others, d = step_of(surgery, tasks=3)
    h = torch.stack(others).mean(0)
    assert torch.allclose(d, g + 0.7 * (h - (h @ g) / (g @ g) * g), atol=1e-10)


@needs_torchjd
def test_layers_may_be_joined_each_by_itself():
    surgery = Surgery("upgrad", scope="layer", memory=30)
    learner, _ = at_a_step(surgery)
    g, state = surgery.main(learner), surgery.rng.get_state()
    rows = [{n: v.clone() for n, v in g.items()}, *surgery.others(learner)]
    surgery.rng.set_state(state)
    surgery.constrain(learner)
    for name, d in surgery.main(learner).items():
        J = torch.stack([row[name].flatten() for row in rows])
        assert torch.allclose(surgery_direction(Surgery("upgrad"), J), d.flatten(), atol=1e-9)


@needs_torchjd
def test_where_there_is_nothing_to_follow_nothing_breaks():
    J = torch.zeros(2, 4, dtype=torch.float64)
    assert not surgery_direction(Surgery("upgrad"), J).any()


@pytest.mark.parametrize("aggregator", ["upgrad", "cagrad"])
def test_without_the_package_a_line_says_how_to_get_it(aggregator, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torchjd", None)
    with pytest.raises(UsageError, match="pip install") as refusal:
        Surgery(aggregator)
    assert "strategy.aggregator=orthogonal" in str(refusal.value)
    Surgery("orthogonal")


@needs_torchjd
@pytest.mark.skipif(importlib.util.find_spec("cvxpy") is None, reason="needs torchjd[cagrad]")
def test_cagrad_stays_near_the_mean():
    J = torch.tensor([[1.0, 0.0], [-1.0, 0.5]], dtype=torch.float64)
    mean = J.mean(0)
    assert torch.allclose(surgery_direction(Surgery("cagrad", c=0.0), J), mean, atol=1e-3)
    d = surgery_direction(Surgery("cagrad", c=0.5), J)
    assert (d - mean).norm() < 0.51 * mean.norm()
    assert (J @ d).min() > (J @ mean).min()


# --- the other objective --------------------------------------------------------------------------


def test_distillation_is_over_classes_that_both_know():
    torch.manual_seed(0)
    new, old = torch.randn(4, 5), torch.randn(4, 5)
    expected = -((old / 2).softmax(1) * (new / 2).log_softmax(1)).sum(1).mean()
    assert torch.allclose(divergence(new, old, 2.0), expected)
    apart = new.clone()
    apart[:, 3:] = -torch.inf
    few = -((old[:, :3] / 2).softmax(1) * (new[:, :3] / 2).log_softmax(1)).sum(1).mean()
    assert torch.allclose(divergence(apart, old, 2.0), few)


def test_the_teacher_is_the_network_of_before_and_has_no_gradient_at_first():
    """While nothing has moved, the old answers are those given now."""
    surgery = Surgery("orthogonal", second="distillation", memory=30)
    _, (theirs,), _ = step_of(surgery, moved=0.0, scenario="task")
    assert theirs.norm() < 1e-6
    assert surgery.teacher is not None


@pytest.mark.parametrize("scenario", ["task", "class", "domain"])
def test_every_scenario_is_learned(scenario):
    stream = make_stream(scenario, tasks=2)
    learner = make_learner(stream, optimizer=functools.partial(SGD, lr=0.05))
    for second in ("replay", "distillation", "memory"):
        strategy = Bloop(second=second, memory=20)
        for task in stream:
            learn(learner, strategy, task, epochs=1)
        assert strategy.exemplars == 40
        assert all(p.isfinite().all() for p in learner.parameters())
