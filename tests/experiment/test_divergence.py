"""KL to the start of a task, by hand and on runs."""

import math

import pytest
import texts
import torch
from probing import run
from toys import make_learner, make_stream

from cl_bench.experiment import EvalSettings, ProbeSettings
from cl_bench.experiment.probes.divergence import Divergence, DivergenceSettings
from cl_bench.learners.observed import log_probabilities
from cl_bench.metrics import divergence
from cl_bench.tracking import read_results


def test_the_divergence_by_hand():
    p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.5, 0.25]])
    assert math.isclose(divergence(p.log(), q.log()), 0.5 * math.log(2))
    assert divergence(q.log(), q.log()) == 0
    assert math.isinf(divergence(q.log(), p.log()))


def test_a_network_that_does_not_move_is_nowhere_else():
    stream = make_stream()
    learner = make_learner(stream)
    found = {}

    class Keeps:
        def probe(self, name, task, values, **more):
            found.update(values)

    watching = Divergence(DivergenceSettings(enabled=True, samples=8), stream, 0, 4, Keeps())
    watching.before_task(learner, stream[1])
    saved = watching.state_dict()
    watching.load_state_dict(saved)
    with torch.no_grad():
        watching.after_task(learner, stream[1])
        assert {k: v["kl"] for k, v in found.items()} == {"t0": 0.0, "t1": 0.0}
        watching.before_task(learner, stream[1])
        learner.heads[0].weight[0] += 0.3
        watching.after_task(learner, stream[1])
    assert [found[name]["new"] for name in ("t0", "t1")] == [0, 1]
    assert all(value["kl"] > 0 for value in found.values())
    assert "t2" not in found


def test_of_text_labelled_tokens_count():
    stream = texts.make_stream(length=32, answer=11)
    learner = texts.make_learner(stream=stream)
    batch = stream[0].sample(3, 0)
    said = log_probabilities(learner, batch, stream[0])
    assert said.shape == (int((batch["labels"] != -100).sum()), len(stream.vocabulary))
    torch.testing.assert_close(said.exp().sum(1), torch.ones(len(said)))


@pytest.mark.usefixtures("no_pictures")
def test_a_run_records_it(tmp_path):
    probe = ProbeSettings(divergence=DivergenceSettings(enabled=True, samples=8))
    run(tmp_path / "run", probe=probe, evaluation=EvalSettings())
    events = [e for e in read_results(tmp_path / "run") if e.get("probe") == "divergence"]
    assert [len(e["values"]) for e in events] == list(range(1, len(events) + 1))
    last = events[-1]["values"]
    assert all(v["kl"] > 0 for v in last.values())
