"""Probes on running experiments: they change nothing and are resumed exactly."""

import functools
import json
import math

import pytest
import torch
from dying import Killed, noisy
from probing import CASES, NOTHING, adamw, halved, probes, run
from torch.optim import SGD
from toys import make_learner, make_stream

from cl_bench.contracts import Recovery, UsageError
from cl_bench.experiment import (
    EvalSettings,
    ProbeSettings,
)
from cl_bench.experiment.probes.features import FeatureSettings
from cl_bench.experiment.probes.landscape import LandscapeSettings
from cl_bench.experiment.probes.recovery import RecoverySettings
from cl_bench.experiment.probes.untouched import measure, untouched
from cl_bench.experiment.probes.updates import UpdateSettings
from cl_bench.experiment.snapshot import random_states
from cl_bench.learners.observed import freed, hidden_states
from cl_bench.report import write_probe_figures
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.isolation.freeze import Freeze
from cl_bench.tracking import read_results
from cl_bench.tracking.wandb import WandbSink
from runs import differences, final_weights, timeless

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.mark.parametrize("case", CASES)
def test_probes_change_no_bit_of_a_run_and_are_resumed_exactly(tmp_path, case):
    options = CASES[case]
    plain, probed = tmp_path / "plain", tmp_path / "probed"
    run(plain, probe=NOTHING, evaluation=EvalSettings(), **options)
    _, learner = run(probed, **options)

    def of_the_run(directory):
        weights = final_weights(directory)
        events = [timeless(e) for e in read_results(directory)]
        kept = [e for e in events if e["event"] in ("evaluation", "epoch")]
        return {k: v for k, v in weights.items() if not k.startswith("/observer")}, kept

    assert of_the_run(plain) == of_the_run(probed)
    assert {e["probe"] for e in read_results(probed) if e["event"] == "probe"} == {
        "curve",
        "dynamics",
        "alignment",
        "landscape",
        "cost",
    }
    for moment in (0.5, 0.8) if case == "finetune" else (0.6,):
        killed = tmp_path / f"killed-{moment}"
        with pytest.raises(Killed):
            run(killed, dies_at=int(moment * learner.batches), **options)
        run(killed, resume=True, **options)
        assert differences(probed, killed) == []
        assert final_weights(probed) == final_weights(killed)


def test_whatever_is_done_inside_untouched_leaves_no_trace():
    stream = halved(make_stream())
    learner = make_learner(stream, noisy(), adamw)
    learner.hold(list(learner.blocks())[:2])
    learner.heads[0].weight.grad = torch.ones_like(learner.heads[0].weight)
    before = {k: v.clone() for k, v in learner.state_dict().items()}
    modes = [m.training for m in learner.modules()]
    flags = [p.requires_grad for p in learner.parameters()]
    with untouched(learner):
        for p in learner.parameters():
            p.requires_grad_(True)
        learner.held_norms.clear()
        learner.train()
        learner.loss(learner(stream[0].everything), stream[0].everything).backward()
        with torch.no_grad():
            for p in learner.parameters():
                p.add_(1.0)
        learner.eval()
    after = learner.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert [m.training for m in learner.modules()] == modes
    assert [p.requires_grad for p in learner.parameters()] == flags
    assert float(learner.heads[0].weight.grad.sum()) == learner.heads[0].weight.numel()
    assert len(learner.held_norms) == 1


@pytest.mark.parametrize("strategy", [Finetune, Freeze])
def test_recovery_trains_again_what_was_forgotten_and_frozen(tmp_path, strategy):
    stream = make_stream(n=44)
    first = stream[0].data.tensors
    for t, task in enumerate(stream):  # the same inputs, other answers
        task.data.tensors.update(x=first["x"], y=(first["y"] + t) % 3)
    stream = halved(stream)
    probe = ProbeSettings(recovery=RecoverySettings(True, steps=60))
    options = {"probe": probe, "evaluation": EvalSettings(), "stream": stream}
    _, learner = run(tmp_path, strategy, optimizer=functools.partial(SGD, lr=0.3), **options)
    old = probes(tmp_path, "alignment")[-1]["values"]["t0"]
    assert old["perf"] < 0.5
    assert old["recovered"] > 0.9
    held = [p for p in learner.parameters() if not p.requires_grad]
    assert freed(learner) == list(learner.parameters())
    assert all(p.requires_grad for p in held)


def test_no_steps_recover_nothing_and_learned_facts_come_back(tmp_path):
    still = ProbeSettings(recovery=RecoverySettings(True, steps=0))
    run(tmp_path / "still", probe=still, evaluation=EvalSettings())
    for event in probes(tmp_path / "still", "alignment"):
        for values in event["values"].values():
            assert values["recovered"] == values["perf"]
            assert values["alignment_ratio"] in (1, None)
    some = ProbeSettings(recovery=RecoverySettings(True, steps=40))
    run(tmp_path / "some", probe=some, evaluation=EvalSettings())
    last = probes(tmp_path / "some", "alignment")[-1]
    assert set(last["values"]) == {"t0", "t1", "t2"}
    old = last["values"]["t0"]
    assert old["recovered"] >= old["perf"]
    assert old["knowledge_drop"] + old["alignment_drop"] == pytest.approx(old["drop"])
    if old["drop"] > 0.05:
        lost = max(old["knowledge_drop"], 0)
        assert old["spurious_fraction"] == pytest.approx(1 - lost / old["drop"])


@pytest.mark.parametrize("spoil", ["no control", "no chance", "above chance"])
def test_without_a_control_at_chance_nothing_is_called_spurious(tmp_path, spoil):
    stream = halved(make_stream(n=44))
    for task in stream:
        r = task.recovery
        control = {"no control": None}.get(spoil, r.control)
        chance = {"no chance": None, "above chance": 0.0}.get(spoil, 1.0)
        task.recovery = Recovery(r.train, r.test, control, chance)
    probe = ProbeSettings(recovery=RecoverySettings(True, steps=2))
    run(tmp_path / "run", probe=probe, evaluation=EvalSettings(), stream=stream)
    events = probes(tmp_path / "run", "alignment")
    assert events
    for event in events:
        assert all(v["spurious_fraction"] is None for v in event["values"].values())


def test_the_curve_begins_and_ends_where_the_matrix_says(tmp_path):
    evaluation = EvalSettings(dense=[0, 1, 3, 7, 10], dense_samples=None)
    run(tmp_path / "run", probe=NOTHING, evaluation=evaluation)
    rows = {
        e["row"]: e["scores"] for e in read_results(tmp_path / "run") if e["event"] == "evaluation"
    }
    for task in (1, 2):
        curve = [e for e in probes(tmp_path / "run", "curve") if e["task"] == task]
        assert [e["step"] for e in curve] == [0, 1, 3, 7, 10, 10]
        names = [f"t{i}" for i in range(task + 1)]
        assert all(list(e["values"]) == names for e in curve)
        assert curve[0]["values"] == {n: rows[task][n] for n in names}
        assert curve[-1]["values"] == {n: rows[task + 1][n] for n in names}
        assert [e["rate_sum"] for e in curve] == pytest.approx([0, 0.05, 0.15, 0.35, 0.5, 0.5])
    assert not [e for e in probes(tmp_path / "run", "curve") if e["task"] == 0]
    (first, _) = probes(tmp_path / "run", "dynamics")
    lowest = min(e["values"]["t0"] for e in probes(tmp_path / "run", "curve") if e["task"] == 1)
    assert first["values"]["t0"]["trough"] == lowest


def test_accumulated_gradients_count_as_one_step(tmp_path):
    run(
        tmp_path / "run",
        probe=NOTHING,
        evaluation=EvalSettings(dense=[1, 2]),
        accumulate_grad_batches=2,
    )
    steps = [e["step"] for e in probes(tmp_path / "run", "curve") if e["task"] == 1]
    assert steps == [0, 1, 2, 6]  # 5 batches an epoch, the last step of each from one batch alone


def test_the_landscape_has_its_corners_where_training_was(tmp_path):
    probe = ProbeSettings(
        early=(0, 4),
        landscape=LandscapeSettings(True, samples=10, along_early=(-1, 1, 3), along_late=(0, 1, 2)),
    )
    stream, learner = run(tmp_path / "run", probe=probe, evaluation=EvalSettings())
    events = probes(tmp_path / "run", "landscape")
    assert [e["task"] for e in events] == [1, 2]
    last = events[-1]
    assert list(last["losses"]) == list(last["anchors"]) == ["t1", "t2"]
    for name, grid in last["losses"].items():
        origin, first, second = last["anchors"][name]
        assert (grid[0][1], grid[0][2], grid[1][2]) == (origin, first, second)
        task = next(t for t in stream if t.name == name)
        batch = task.sample(10, 0)
        learner.eval()
        with torch.no_grad():
            assert float(learner.loss(learner(batch), batch)) == second
    assert set(last["values"]) == {"u_norm", "v_norm", "cosine"}


def test_what_is_frozen_neither_turns_nor_drifts(tmp_path):
    probe = ProbeSettings(
        early=(0, 3), updates=UpdateSettings(True), features=FeatureSettings(True)
    )
    frozen = functools.partial(Freeze, 1)
    _, learner = run(tmp_path / "run", frozen, probe=probe, evaluation=EvalSettings())
    names = {id(m): n for n, m in learner.named_modules()}
    bottom, above = [names[id(b)] for b in learner.blocks()][:2]
    for event in [e for e in read_results(tmp_path / "run") if e["event"] == "layers"][1:]:
        still, moved = event["layers"][bottom], event["layers"][above]
        for window in ("task", "early", "late"):
            assert still[f"wupd/{window}/rel_norm"] == 0
            assert moved[f"wupd/{window}/rel_norm"] > 0
            assert still[f"feat/t0/{window}/shift"] == 0
            assert still[f"feat/t0/{window}/pc_angle"] < 1e-5
            assert moved[f"feat/t0/{window}/shift"] > 0
        assert still["wupd/early-late/theta_mean"] is None
        assert 0 <= moved["wupd/early-late/theta_mean"] <= 90


def test_phases_add_up_and_the_previous_task_is_compared(tmp_path):
    probe = ProbeSettings(early=(0, 4), updates=UpdateSettings(True))
    run(tmp_path / "run", probe=probe, evaluation=EvalSettings())
    first, second, _ = (
        e["layers"] for e in read_results(tmp_path / "run") if e["event"] == "layers"
    )
    some = next(iter(second.values()))
    assert {"wupd/previous-task/theta_mean", "wupd/previous-early/overlap_excess"} <= set(some)
    assert not any(k.startswith("wupd/previous") for k in next(iter(first.values())))
    assert not any(k.startswith("wupd/pretraining") for k in some)


def test_a_task_that_ends_early_has_no_late_phase(tmp_path):
    probe = ProbeSettings(
        early=(0, 400),
        updates=UpdateSettings(True),
        features=FeatureSettings(True),
        landscape=LandscapeSettings(True),
    )
    run(tmp_path / "run", probe=probe, evaluation=EvalSettings())
    layers = [e for e in read_results(tmp_path / "run") if e["event"] == "layers"][-1]["layers"]
    keys = {key for values in layers.values() for key in values}
    assert any(key.startswith("feat/t0/task/") for key in keys)
    assert not any("late" in key for key in keys)
    assert probes(tmp_path / "run", "landscape") == []


def test_hidden_states_are_those_of_evaluation():
    stream = make_stream()
    learner = make_learner(stream, noisy(), adamw)
    learner.train()
    before = random_states()["torch"]
    states = hidden_states(learner, stream[0].everything, stream[0])
    assert torch.equal(before, random_states()["torch"])
    assert learner.training
    learner.eval()
    x = stream[0].everything["x"]
    assert torch.equal(next(iter(states.values())), learner.blocks()[0](x))
    assert all(v.shape[0] == len(x) and v.dim() == 2 for v in states.values())
    score, _ = measure(learner, stream[0], stream[0].test, 7, None)
    assert score == pytest.approx(learner.performance(stream[0].everything))


def test_costs_are_recorded(tmp_path):
    run(tmp_path / "run")
    costs = probes(tmp_path / "run", "cost")
    names = {"alignment", "dense", "updates", "features", "recovery", "landscape"}
    assert [set(e["seconds"]) for e in costs] == [names] * 3
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    for name in names:
        total = sum(e["seconds"][name] for e in costs)
        assert summary["probe_seconds"][name] == pytest.approx(total)
        assert total > 0


def test_looking_between_packed_steps_is_refused(tmp_path):
    with pytest.raises(UsageError, match="add pack=1"):
        run(tmp_path / "run", pack=2)


def test_recovery_needs_halves(tmp_path):
    with pytest.raises(UsageError, match="declares disjoint halves"):
        run(tmp_path / "run", stream=make_stream())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: EvalSettings(dense=[-1]), r"eval.dense=\[-1\]"),
        (lambda: EvalSettings(dense=[1.5]), r"eval.dense=\[1.5\]"),
        (lambda: EvalSettings(dense_samples=0), "eval.dense_samples=0"),
        (lambda: ProbeSettings(early=(4, 4)), r"probe.early=\[4, 4\]"),
        (lambda: UpdateSettings(energy=1.2), "probe.updates.energy=1.2"),
        (lambda: FeatureSettings(samples=1), "probe.features.samples=1"),
        (lambda: FeatureSettings(components=0), "probe.features.components=0"),
        (lambda: RecoverySettings(steps=-1), "probe.recovery.steps=-1"),
        (lambda: RecoverySettings(rate=0.0), "probe.recovery.rate=0.0"),
        (lambda: RecoverySettings(samples=0), "probe.recovery.samples=0"),
        (lambda: RecoverySettings(at=["x"]), "probe.recovery.at"),
        (lambda: LandscapeSettings(samples=0), "probe.landscape.samples=0"),
        (lambda: LandscapeSettings(along_late=(1, 0, 3)), "probe.landscape.along_late"),
        (lambda: LandscapeSettings(along_early=(0, 1, 2.5)), "probe.landscape.along_early"),
    ],
)
def test_settings_are_checked(make, words):
    with pytest.raises(UsageError, match=words):
        make()


def test_figures_are_drawn_from_the_files(tmp_path):
    run(tmp_path / "run")
    names = [path.name for path in write_probe_figures(tmp_path / "run")]
    assert sorted(names) == ["curve.png", "landscape_2.png", "landscape_3.png"]
    run(tmp_path / "plain", probe=NOTHING, evaluation=EvalSettings())
    assert write_probe_figures(tmp_path / "plain") == []


def test_at_evaluation_time_the_same_numbers_come_out_as_from_the_trainer(tmp_path):
    """Dense scores and the accuracy matrix are one definition, also with a bf16 Trainer."""
    evaluation = EvalSettings(dense=[0], dense_samples=None)
    run(tmp_path / "run", probe=NOTHING, evaluation=evaluation, precision="bf16-mixed")
    rows = [e for e in read_results(tmp_path / "run") if e["event"] == "evaluation"]
    curve = [e for e in probes(tmp_path / "run", "curve") if e["task"] == 2]
    assert curve[0]["values"]["t0"] == rows[2]["scores"]["t0"]
    assert not math.isnan(curve[-1]["values"]["t2"])


def test_loggers_get_numbers_on_the_axis_they_belong_to(tmp_path):
    logged = []

    class Sink(WandbSink):
        def _log(self, values, **axis):
            logged.append((values, axis))

    run(tmp_path / "run")
    sink = Sink(tmp_path, {}, mode="offline")
    for event in read_results(tmp_path / "run"):
        if event["event"] == "probe" and event["task"] == 1:
            sink.event(event)
    by_axis = {(next(iter(axis)), key) for values, axis in logged for key in values}
    assert {
        ("curve_step", "curve/task_2/t0"),
        ("curve_step", "curve/task_2/alignment/t0/recovered"),
        ("task", "alignment/t0/recovered"),
        ("task", "dynamics/t0/trough"),
        ("task", "landscape/u_norm"),
        ("task", "cost/seconds/recovery"),
    } <= by_axis
    assert {axis["task"] for _, axis in logged if "task" in axis} == {2}
    assert {axis["curve_step"] for _, axis in logged if "curve_step" in axis} == {0, 1, 3, 4, 8, 10}
