"""A slice of a stream is a stream that can be run."""

import pytest
import torch
from pictures import assert_same, everything
from toys import make_engine, make_learner, make_stream

from cl_bench.contracts import Pretraining, Recovery, UsageError
from cl_bench.experiment.checks import check_tasks
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.strategies.replay.er import ER
from cl_bench.tasks.permuted_digits import PermutedDigits
from cl_bench.tasks.split_digits import SplitDigits

SLICES = [slice(3), slice(1, 3), slice(2, None), slice(None, None, -1), slice(0, 5, 2)]


@pytest.mark.parametrize("part", SLICES, ids=str)
@pytest.mark.parametrize("scenario", ["task", "class", "domain"])
def test_tasks_heads_and_classes_are_counted_anew(scenario, part):
    whole = SplitDigits(scenario=scenario, class_order="random", order_seed=1)
    cut = whole[part]
    chosen = whole.tasks[part]
    assert [task.name for task in cut] == [task.name for task in chosen]
    assert cut.heads == ([2] if scenario == "domain" else [2] * len(chosen))
    check_tasks(cut)
    for i, (task, original) in enumerate(zip(cut, chosen, strict=True)):
        start = 0 if scenario == "domain" else 2 * i
        assert (task.index, task.head) == (i, 0 if scenario == "domain" else i)
        assert task.classes == range(start, start + 2)
        assert (task.metric, task.origin, task.facts) == ("accuracy", original.origin, {})
        for split in ("train", "validation", "test"):
            found, before = (everything(getattr(t, split)) for t in (task, original))
            assert torch.equal(found["x"], before["x"])
            assert torch.equal(found["y"] - start, before["y"] - original.classes.start)
            assert found.keys() == before.keys()
            assert "task" not in found or found["task"].unique().tolist() == [i]
        drawn, before = task.sample(7, 3), original.sample(7, 3)
        assert torch.equal(drawn["x"], before["x"])
        assert torch.equal(drawn["y"] - start, before["y"] - original.classes.start)


def test_a_slice_from_the_beginning_has_the_same_tasks():
    whole = SplitDigits()
    assert whole[:3].tasks == whole.tasks[:3]


def test_a_slice_of_a_slice_and_where_nothing_is_shifted():
    whole = SplitDigits()
    assert_same(everything(whole[1:][1:][0].test), everything(whole[2:][0].test))
    domain = PermutedDigits(num_tasks=4)
    assert domain[2:][0].train is domain[2].train, "nothing in these batches changes"


def test_a_slice_keeps_what_its_stream_is():
    whole = make_stream(tasks=3)
    whole.pretraining = Pretraining("p", iter, 1)
    whole.vocabulary = ("a",)
    cut = whole[1:]
    assert type(cut) is type(whole)
    assert (cut.pretraining, cut.vocabulary) == (whole.pretraining, ("a",))
    assert (cut.name, cut.scenario, cut.fingerprint) == ("toy", "domain", "toy")
    assert len(whole) == 3, "the whole stream is as it was"
    with pytest.raises(UsageError, match="stream 'toy' has 3 tasks, none of them in slice"):
        whole[3:]


@pytest.mark.parametrize("scenario", ["task", "class", "domain"])
@pytest.mark.parametrize("strategy", [Finetune, lambda: GPM(0.9, samples=40), lambda: ER(20)])
def test_a_slice_runs(scenario, strategy):
    cut = make_stream(scenario, tasks=4)[2:]
    learner = make_learner(cut)
    assert len(learner.heads) == (1 if scenario == "domain" else 2)
    rule = strategy()
    engine = make_engine(learner, rule, epochs=10)
    for t, task in enumerate(cut):
        engine.learn(task, rule.plan(cut, t))
    scores = engine.evaluate(list(cut), 100, None)
    assert scores["t3"] > 0.6, "chance is a third"


@pytest.mark.parametrize("chance", [None, 0.3])
def test_a_slice_keeps_what_recovery_is_measured_against(chance):
    whole = make_stream("task", tasks=3)
    for task in whole:
        task.recovery = Recovery(task.train, task.test, task.validation, chance)
    found, original = whole[1:][0].recovery, whole[1].recovery
    assert found.chance == chance
    index = torch.arange(len(original.control))
    shift = whole[1].classes.start
    for part in ("train", "test", "control"):
        before, after = getattr(original, part)[index], getattr(found, part)[index]
        assert torch.equal(after["x"], before["x"])
        assert torch.equal(after["y"], before["y"] - shift)
