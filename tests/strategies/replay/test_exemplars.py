"""How many samples a strategy keeps: part of a run's costs; rows that keep any stand apart."""

import pytest
import torch
from test_study import make_run
from toys import make_engine, make_learner, make_stream

from cl_bench.contracts import Needs, UsageError
from cl_bench.contracts.strategy import Strategy
from cl_bench.experiment import Together, check_pair
from cl_bench.experiment.budget import describe_budget
from cl_bench.report.compare import to_csv
from cl_bench.report.study import read_study
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.replay.agem import AGEM
from cl_bench.strategies.replay.er import ER
from cl_bench.strategies.replay.icarl import ICaRL

LAST = [0.5, 0.6, 0.9]


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


def test_rows_that_keep_samples_are_a_block_of_their_own_with_the_bounds(tmp_path):
    for strategy, kept in (("finetune", 0), ("gpm", 0), ("er", 500), ("der", 200), ("joint", 0)):
        bound = {"finetune": "lower", "joint": "upper"}.get(strategy)
        facts = {"facts": {"bound": bound}} if bound else {}
        for seed in (0, 1):
            make_run(tmp_path / strategy / str(seed), strategy, seed, LAST, exemplars=kept, **facts)
    study = read_study([tmp_path])
    assert [(b.title, sorted(r.label for r in b.rows)) for b in study.blocks] == [
        ("digits", ["finetune", "gpm", "joint"]),
        ("digits with old samples kept", ["der", "er", "finetune", "joint"]),
    ]
    assert study.blocks[1].rows[1].upper.label == "joint"
    warnings = [w for w in study.blocks[1].warnings() if w.startswith("samples kept")]
    assert warnings == ["samples kept: 2.50 times, 200 (der) to 500 (er)"]
    assert "digits with old samples kept,der" in to_csv(study)
    assert not study.left_out


def test_what_is_said_twice_is_left_out_once(tmp_path):
    make_run(tmp_path / "er", "er", 0, LAST, exemplars=5)
    for again in ("a", "b"):
        make_run(tmp_path / again, "finetune", 0, LAST, exemplars=0, facts={"bound": "lower"})
    make_run(tmp_path / "gpm", "gpm", 0, LAST, exemplars=0)
    assert len(read_study([tmp_path]).left_out) == 1


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
