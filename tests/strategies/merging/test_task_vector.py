"""Task vectors, and runs against each other."""

import numpy as np
import pytest
import torch
from toys import learn, learn_stream, make_learner, make_stream, weights

from cl_bench.contracts import Progress, UsageError
from cl_bench.learners.observed import loss_on
from cl_bench.report.tradeoff import main, matched_table, read_path, tradeoff_figure
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.merging.task_vector import TaskVector
from cl_bench.tracking import open_record


def after(alpha):
    """Weights after two tasks, and both losses."""
    stream = make_stream()
    learner = make_learner(stream)
    learn_stream(learner, TaskVector(alpha), stream[:2])
    return weights(learner), *(loss_on(learner, t.everything, t) for t in stream[:2])


def test_a_share_of_the_later_tasks_update_is_taken_back():
    stream = make_stream()
    learner = make_learner(stream)
    learn(learner, Finetune(), stream[0])
    start = weights(learner)
    learn(learner, Finetune(), stream[1])
    end = weights(learner)
    found, *_ = after(0.3)
    for name in end:
        assert torch.allclose(found[name], end[name] - 0.3 * (end[name] - start[name]), atol=1e-7)


def test_nothing_taken_back_is_fine_tuning_and_all_of_it_is_the_old_network_bit_for_bit():
    stream = make_stream()
    learner = make_learner(stream)
    learn(learner, Finetune(), stream[0])
    start = weights(learner)
    assert all(torch.equal(w, start[n]) for n, w in after(1.0)[0].items())
    learn(learner, Finetune(), stream[1])
    assert all(torch.equal(w, weights(learner)[n]) for n, w in after(0.0)[0].items())


def test_the_more_is_taken_back_the_less_is_known_of_the_new_task():
    losses = [after(alpha)[2] for alpha in (0.0, 0.5, 1.0)]
    assert losses[0] < losses[1] < losses[2]


def test_the_vector_may_end_at_an_earlier_epoch():
    stream = make_stream()
    learner = make_learner(stream)
    strategy = TaskVector(0.5, epoch=1)
    learner.begin(stream[0], strategy)
    start = weights(learner)
    with torch.no_grad():
        for p in learner.parameters():
            p.add_(1.0)
    strategy.after_epoch(learner, stream[0], Progress(1, 2, 0.0, 0.1))
    with torch.no_grad():
        for p in learner.parameters():
            p.add_(2.0)
    strategy.after_epoch(learner, stream[0], Progress(2, 2, 0.0, 0.1))
    kept = TaskVector(0.5, epoch=1)
    kept.load_state_dict(strategy.state_dict())
    kept.start = strategy.start
    kept.consolidate(learner, stream[1], {})
    for name, weight in weights(learner).items():
        assert torch.allclose(weight, start[name] + 2.5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": -0.1}, "strategy.alpha=-0.1"),
        ({"start_task": -1}, "strategy.start_task=-1"),
        ({"epoch": 0}, "strategy.epoch=0"),
    ],
)
def test_wrong_options_are_named(options, words):
    with pytest.raises(UsageError, match=words):
        TaskVector(**options)


def test_an_epoch_that_never_comes_is_said_after_the_first():
    strategy = TaskVector(epoch=5)
    with pytest.raises(UsageError, match=r"strategy.epoch=5: task 't0' has 2 epochs"):
        strategy.after_epoch(None, make_stream()[0], Progress(1, 2, 0.0, 0.1))


# -- runs against each other ------------------------------------------------------------------


def record(directory, strategy, old, new, end, curve=True):
    facts = {"stream": "toy", "strategy": strategy, "seed": 0}
    with open_record(directory, ["a", "b"], task_id_known=False, facts=facts) as made:
        made.row(0, None, {"a": 0.0, "b": 0.0}, 0.1)
        made.row(1, 0, {"a": 0.9, "b": 0.0}, 0.1)
        for step, (x, y) in enumerate(zip(old, new, strict=True)):
            if curve:
                made.probe("curve", 1, {"a": x, "b": y}, step=10 * step)
        made.row(2, 1, {"a": end[0], "b": end[1]}, 0.1)
    return directory


def test_runs_are_compared_where_the_new_task_is_learned_equally_well(tmp_path, capsys):
    fast = record(tmp_path / "fast", "finetune", [0.9, 0.4, 0.2], [0, 0.99, 1.0], (0.2, 1.0))
    slow = record(tmp_path / "slow", "freeze", [0.9, 0.8, 0.5], [0, 0.5, 0.98], (0.5, 0.98))
    never = record(tmp_path / "never", "frozen", [0.9, 0.9], [0, 0.1], (0.9, 0.1))
    bare = record(tmp_path / "bare", "vector", [], [], (0.3, 0.99))
    out = tmp_path / "figure.png"
    assert main([str(d) for d in (fast, slow, never, bare)] + [f"--out={out}"]) == 0
    assert out.stat().st_size > 10_000
    printed = [line for line in capsys.readouterr().out.splitlines() if "·" in line]
    lines = {line.split("·")[1].split()[0]: line.split() for line in printed}
    assert lines["finetune"][-5:] == ["10", "99.0", "40.0", "100.0", "20.0"]
    assert lines["freeze"][-5:] == ["20", "98.0", "50.0", "98.0", "50.0"]
    assert lines["frozen"][-5:] == ["-", "-", "-", "10.0", "90.0"]
    assert lines["vector"][-5:] == ["-", "-", "-", "99.0", "30.0"]


def test_a_passage_ends_where_the_matrix_ends(tmp_path):
    found = read_path(record(tmp_path / "run", "x", [0.9, 0.4], [0.0, 1.0], (0.35, 0.97)))
    assert (found.steps, found.end) == ([0, 10], (0.35, 0.97))
    assert matched_table([found], 0.5).row_count == 1
    axes = tradeoff_figure([found]).axes[0]
    assert [tuple(np.round(line.get_xydata()[-1], 6)) for line in axes.lines] == [
        (100.0, 40.0),
        (97.0, 35.0),
    ]


def test_what_cannot_be_compared_is_said(tmp_path, capsys):
    with open_record(tmp_path / "one", ["a"], task_id_known=False) as made:
        made.row(1, 0, {"a": 0.5}, 0.1)
    assert main([str(tmp_path / "one")]) == 2
    assert "at least two tasks" in capsys.readouterr().err
    assert main([str(tmp_path / "none")]) == 2
    assert main([str(tmp_path / "one"), "--level=2"]) == 2
    assert "--level=2" in capsys.readouterr().err
