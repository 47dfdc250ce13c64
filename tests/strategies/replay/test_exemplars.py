"""How many samples a strategy keeps: part of a run's costs."""

import pytest
import torch
from toys import make_engine, make_learner, make_stream

from cl_bench.contracts import Needs, UsageError
from cl_bench.contracts.strategy import Strategy
from cl_bench.experiment import Together, check_pair
from cl_bench.experiment.budget import describe_budget
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.replay.agem import AGEM
from cl_bench.strategies.replay.er import ER
from cl_bench.strategies.replay.icarl import ICaRL


@pytest.mark.parametrize(
    ("strategy", "count"),
    [
        (Finetune(), 0),
        (ER(memory=25), 25),
        (AGEM(memory=15), 30),
        (ICaRL(memory=20), 18),
        (Together({"finetune": Finetune(), "er": ER(memory=25)}), 25),
    ],
)
def test_costs_say_how_many_samples_are_kept_and_in_how_many_bytes(strategy, count):
    stream = make_stream("class", tasks=2)
    learner = make_learner(stream)
    engine = make_engine(learner, strategy, epochs=1)
    for t in range(2):
        engine.learn(stream[t], strategy.plan(stream, t))
    found = describe_budget(learner, strategy, stream)
    assert found["exemplars"] == strategy.exemplars == count
    sample = sum(v[0].numel() * v.element_size() for v in stream[0].everything.values())
    assert found["strategy_bytes"] >= count * sample
    assert (found["strategy_bytes"] == 0) == (count == 0)


def test_a_strategy_says_which_scenarios_it_learns():
    class Only(Strategy):
        needs = Needs(scenarios=frozenset({"class"}))

    class Either(Strategy):
        needs = Needs(scenarios=frozenset({"class", "task"}))

    check_pair("only", Only(), make_stream("class"))
    check_pair("either", Either(), make_stream("task"))
    with pytest.raises(UsageError, match=r"scenario class or task.*is of scenario domain"):
        check_pair("either", Either(), make_stream("domain"))
    both = Together({"a": Only(), "b": Either(), "c": Strategy()})
    assert both.needs.scenarios == {"class"}


def test_heads_of_tasks_to_come_take_part_until_the_next_task():
    stream = make_stream("class")
    learner = make_learner(stream)
    learner.begin(stream[0], Finetune())
    learner.train()
    assert learner(stream[0].everything).shape[1] == 3
    learner.train_heads("all")
    assert learner(stream[0].everything).shape[1] == 9
    assert all(p.requires_grad for p in learner.heads.parameters())
    with torch.no_grad(), learner.evaluating():
        assert learner(stream[0].everything).shape[1] == 3
    learner.begin(stream[1], Finetune())
    assert learner(stream[1].everything).shape[1] == 6
    assert not learner.heads[2].weight.requires_grad
