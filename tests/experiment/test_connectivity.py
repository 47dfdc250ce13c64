"""Loss along straight lines between the weights after tasks: barriers, ends, no trace, resume."""

import functools

import numpy as np
import pytest
import torch
from dying import Killed, differences, final_weights
from probing import NOTHING, run
from torch.optim import SGD

from cl_bench.experiment import EvalSettings, ProbeSettings
from cl_bench.experiment.probes.connectivity import ConnectivitySettings
from cl_bench.learners.observed import loss_on
from cl_bench.metrics.connectivity import barrier
from cl_bench.report import write_probe_figures
from cl_bench.tracking import read_results

ALL = ProbeSettings(connectivity=ConnectivitySettings(True, samples=40, between=4, to="all"))
OPTIONS = {"evaluation": EvalSettings(), "optimizer": functools.partial(SGD, lr=0.3)}


def paths(directory):
    return [e for e in read_results(directory) if e.get("probe") == "connectivity"]


def test_a_barrier_is_what_rises_above_the_chord():
    along = np.linspace(0, 1, 5)
    assert barrier(along, 3 - 2 * along) == pytest.approx(0)
    assert barrier(along, (along - 0.5) ** 2) == 0, "a valley is no barrier"
    assert barrier(along, 1 - (2 * along - 1) ** 2) == pytest.approx(1)
    assert barrier(along, 1 - (2 * along - 1) ** 2 + 7 * along) == pytest.approx(1)
    assert np.isnan(barrier(along, [0, np.nan, 0, 0, 0]))


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    directory = tmp_path_factory.mktemp("walked") / "run"
    return directory, *run(directory, probe=ALL, **OPTIONS)


def test_lines_end_where_training_was(walked):
    directory, stream, learner = walked
    first, second = paths(directory)
    assert list(first["losses"]) == ["t0"]
    assert list(second["losses"]) == ["t0", "t1"]
    assert list(second["losses"]["t0"]) == ["t0", "t1", "t2"]
    for name in ("t0", "t1"):  # the end of one line is the beginning of the next
        assert first["losses"]["t0"][name][-1] == second["losses"]["t1"][name][0]
    for task in stream:
        now = loss_on(learner, task.sample(40, 0), task)
        for found in second["losses"].values():
            assert found[task.name][-1] == pytest.approx(now, rel=1e-6)
    for start, found in second["losses"].items():
        for name, losses in found.items():
            expected = barrier(second["along"], losses)
            assert second["values"][start][f"barrier/{name}"] == pytest.approx(expected)


def test_it_leaves_no_trace_and_resumes(walked, tmp_path):
    directory, _, learner = walked
    _, plain = run(tmp_path / "plain", probe=NOTHING, **OPTIONS)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, learner.state_dict()[name])
    killed = tmp_path / "killed"
    with pytest.raises(Killed):
        run(killed, probe=ALL, dies_at=int(0.8 * learner.batches), **OPTIONS)
    run(killed, probe=ALL, resume=True, **OPTIONS)
    assert differences(directory, killed) == []
    assert final_weights(directory) == final_weights(killed)


def test_the_task_before_is_enough_unless_all_are_asked_for(tmp_path):
    previous = ProbeSettings(connectivity=ConnectivitySettings(True, samples=10, between=1))
    run(tmp_path / "run", probe=previous, **OPTIONS)
    assert [list(e["losses"]) for e in paths(tmp_path / "run")] == [["t0"], ["t1"]]
    assert [p.name for p in write_probe_figures(tmp_path / "run")] == ["connectivity.png"]
