"""What an answer costs stands in the summary: passes of the network, adapters in memory."""

import pytest
from toys import make_engine, make_learner, make_stream

from cl_bench.adapters import Spectral
from cl_bench.adapters.adapter import Adapter
from cl_bench.contracts import Strategy
from cl_bench.experiment import Together, budget
from cl_bench.experiment.budget import describe_budget
from cl_bench.report.quantities import COSTS
from cl_bench.strategies.analytic.aper import APER
from cl_bench.strategies.analytic.ncm import NCM
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.replay.er import ER


def kept():
    adapter = Adapter(Spectral(r=2), end="keep")
    return Together({"adapter": adapter, "finetune": Finetune()})


@pytest.mark.parametrize(
    ("make", "scenario", "passes", "adapters"),
    [
        (Finetune, "class", 1, 0),
        (NCM, "class", 1, 0),
        (APER, "class", 2, 0),
        (lambda: Together({"er": ER(memory=9), "aper": APER()}), "class", 2, 0),
        (kept, "task", 1, 2),
    ],
)
def test_the_summary_says_what_an_answer_costs(make, scenario, passes, adapters):
    stream, strategy = make_stream(scenario, tasks=2), make()
    learner = make_learner(stream)
    strategy.check(learner)
    engine = make_engine(learner, strategy, epochs=1)
    for t in range(2):
        engine.learn(stream[t], strategy.plan(stream, t))
    found = describe_budget(learner, strategy, stream)
    assert (found["prediction_passes"], found["prediction_adapters"]) == (passes, adapters)
    assert {"prediction_passes", "prediction_adapters"} <= COSTS.keys()


def test_a_slow_network_is_timed_twice(monkeypatch):
    class Answers(Strategy):
        asked = 0

        def predict(self, learner, batch, task):
            self.asked += 1
            return learner(batch)

    monkeypatch.setattr(budget, "PATIENCE_SECONDS", 0.0)
    strategy, stream = Answers(), make_stream()
    budget.inference_overhead(make_learner(stream), strategy, stream)
    assert strategy.asked == 2
