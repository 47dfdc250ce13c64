"""The outer loop knows an engine by its contract alone."""

import numpy as np
from toys import Silent

from cl_bench.contracts import Strategy
from cl_bench.experiment import EvalSettings, Experiment
from cl_bench.tasks.permuted_digits import PermutedDigits
from cl_bench.tracking import open_record, read_results


class Rote:
    """Knows by heart what it has learned, and forgets all but the newest task by half."""

    def __init__(self):
        self.calls, self.known, self.details = [], {}, {}

    def learn(self, task, plan):
        self.calls.append(("learn", task.index, len(plan.data)))
        self.known = {name: score / 2 for name, score in self.known.items()} | {task.name: 1.0}
        return {"memory": {"tasks": len(self.known)}}

    def evaluate(self, tasks, batch_size, max_samples):
        self.calls.append(("evaluate", len(tasks)))
        self.details = {task.name: {"known": float(task.name in self.known)} for task in tasks}
        return {task.name: self.known.get(task.name, 0.0) for task in tasks}

    def between_tasks(self, t):
        self.calls.append(("between", t))


def test_any_engine_that_keeps_the_contract_runs_in_the_outer_loop(tmp_path):
    stream = PermutedDigits(num_tasks=3, task_id_at_test=False)
    engine = Rote()
    names = [task.name for task in stream]
    with open_record(tmp_path / "run", names, task_id_known=False) as record:
        R = Experiment(stream, Strategy(), engine, EvalSettings(), record, Silent()).run()
    assert np.array_equal(R, [[0, 0, 0], [1, 0, 0], [0.5, 1, 0], [0.25, 0.5, 1]])
    size = len(stream[0].train)
    calls = [("evaluate", 3), ("between", 0)]
    for t in range(3):
        calls += [("learn", t, size), ("evaluate", 3), ("between", t + 1)]
    assert engine.calls == calls
    events = read_results(tmp_path / "run")
    rows = [e["details"][names[0]]["known"] for e in events if e["event"] == "evaluation"]
    assert rows == [0, 1, 1, 1]
    assert [e["layers"]["memory"]["tasks"] for e in events if e["event"] == "layers"] == [1, 2, 3]
